"""What an encoded image keeps, what it takes, and what is left of it without its attention."""

from __future__ import annotations

import torch

from zeroseg.attention import EncodedImage


def encoded(tokens: int = 256) -> EncodedImage:
    generator = torch.Generator().manual_seed(0)
    maps = torch.rand(tokens, tokens, generator=generator).softmax(-1)
    return EncodedImage(torch.rand(3, 32, 32, generator=generator), (64, 64), torch.zeros(1, 4, 8, 8), maps)


def test_bytes_do_not_change_with_use():
    image = encoded()
    before = image.nbytes
    assert before > 2 * image.attention.nbytes + image.image.nbytes
    _ = image.salience, image.upsample(torch.rand(2, 256), "guided")
    assert image.nbytes == before


def test_without_attention_clicks_are_answered_and_the_rest_is_recalled():
    whole, recalled = encoded(), []

    def again() -> EncodedImage:
        recalled.append(1)
        return encoded()

    light = whole.without_attention(again)
    assert light.nbytes < whole.nbytes / 2
    assert torch.equal(light.paths([3]), whole.paths([3])) and light.side == 16 and not recalled
    call = light.fresh()
    assert torch.equal(call.attention, whole.attention) and torch.equal(call.salience, whole.salience)
    assert recalled == [1], "once for a call"
    assert light._attention is None, "and the memory keeps what it kept"


def test_what_is_kept_depends_on_its_key():
    image, made = encoded(), []
    for key in ("a", "a", "b"):
        image.keep("proposals", key, lambda key=key: made.append(key) or key)
    assert made == ["a", "b"]
    image.forget()
    image.keep("proposals", "b", lambda: made.append("c"))
    assert made == ["a", "b", "c"]
