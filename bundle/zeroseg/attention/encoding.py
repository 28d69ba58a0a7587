"""One image after the backbone's pass: all that prompts need, so that the pass is never repeated."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from typing import TypeVar, cast

from torch import Tensor

from zeroseg.attention.aggregate import grid_side
from zeroseg.attention.geodesic import TokenPaths
from zeroseg.attention.merge import KLDistance
from zeroseg.attention.readout import Readout, read_out
from zeroseg.attention.refine import Upsampler
from zeroseg.attention.rules import border_tokens, frame_relevance

Value = TypeVar("Value")


class EncodedImage:
    """An encoded image; what a prompt works out and the next one may need is kept with it.

    The attention takes by far the most memory: 64 MB for a slice and the embedded model, where the paths between tokens, and its
    read-out, all that clicks need, take about 1 MB. ``without_attention`` keeps those and asks for the attention again when it is
    needed after all.

    Args:
        image: (3, h, w) in [0, 1], the guide of the refinement; at most ``working_size`` pixels a side.
        size: (H, W) of the original image.
        latents: (1, C, h', w') clean latents.
        attention: (N, N) aggregated attention, rows sum to 1.
        seconds: time per stage so far.

    Attributes:
        image, size, latents, seconds: as given.
        side: tokens along a side of the attention grid.
    """

    def __init__(
        self,
        image: Tensor,
        size: tuple[int, int],
        latents: Tensor,
        attention: Tensor,
        seconds: dict[str, float] | None = None,
    ):
        self.image, self.size, self.latents = image, size, latents
        self.seconds = {} if seconds is None else seconds
        self.side = grid_side(attention.shape[0])
        self._attention: Tensor | None = attention
        self._again: Callable[[], EncodedImage] | None = None
        self._distance: KLDistance | None = None
        self._paths: TokenPaths | None = None
        self._salience: Tensor | None = None
        # Shared by the copies of an encoding: small, and too dear to be worked out twice.
        self._lasting: dict[str, Readout] = {}
        self._upsampler: tuple[str, Upsampler] | None = None
        self._kept: dict[str, tuple[Hashable, object]] = {}

    @property
    def attention(self) -> Tensor:
        """(N, N) aggregated attention; recalled where it had to go."""
        # Nothing is dropped that cannot be recalled, see ``forget``.
        if self._attention is None and self._again is not None:
            full = self._again()
            self._attention, self._distance = full.attention, full.distance
        return self._attention

    @property
    def distance(self) -> KLDistance:
        """Distances to the tokens' attention maps, whose logarithms are taken on first use and kept."""
        # Recalling the attention brings its logarithms along.
        attention = self.attention
        if self._distance is None:
            self._distance = KLDistance(attention)
        return self._distance

    @property
    def paths(self) -> TokenPaths:
        """Shortest paths between tokens, whose steps are measured on first use and kept."""
        if self._paths is None:
            self._paths = TokenPaths(self.distance)
        return self._paths

    @property
    def salience(self) -> Tensor:
        """(N,) in [0, 1], how every token stands out from the image's frame, see ``rules.frame_relevance``; kept."""
        if self._salience is None:
            frame = border_tokens(self.side).to(self.attention.device)
            self._salience = frame_relevance(self.distance, frame, self.paths)
        return self._salience

    @property
    def readout(self) -> Readout:
        """What a promptable head reads of the attention, worked out on first use and kept."""
        if "readout" not in self._lasting:
            self._lasting["readout"] = read_out(self.distance, self.paths, self.salience)
        return self._lasting["readout"]

    def upsample(self, maps: Tensor, refine: str) -> Tensor:
        """(K, N) maps over the tokens -> (K, h, w) over the pixels of ``image``; what needs no map is computed once."""
        if self._upsampler is None or self._upsampler[0] != refine:
            self._upsampler = refine, Upsampler(self.image, self.side, refine)
        return self._upsampler[1](maps.view(-1, self.side, self.side))

    def keep(self, name: str, key: Hashable, make: Callable[[], Value]) -> Value:
        """What ``make`` gives, worked out once and kept with the image until ``key`` is another.

        Args:
            name: of what is kept, for example ``proposals``.
            key: the settings it depends on.
            make: works it out.
        """
        if name not in self._kept or self._kept[name][0] != key:
            self._kept[name] = key, make()
        return cast(Value, self._kept[name][1])

    @property
    def nbytes(self) -> int:
        """Bytes the image takes once prompts have asked for all they may: the same before and after they did."""
        tokens = self.side**2
        # 8-neighbourhoods, each step kept once: a float64 cost and an int32 end. The guided filter keeps up to five images.
        # The read-out keeps its steps, coordinates and salience, and two maps for each place prompted, some dozens.
        least = 6 * self.image.nbytes + self.latents.nbytes + 4 * tokens * 12 + (17 + 2 * 32) * tokens * 4
        if self._again is not None:
            return least
        # Beside the attention stand its logarithms, as large; a text's noise draws are 8 latents and their noise.
        return least + 2 * tokens * tokens * 4 + 16 * self.latents.nbytes

    def without_attention(self, again: Callable[[], EncodedImage]) -> EncodedImage:
        """What is left when the attention has to go: enough for clicks, a fraction of the memory.

        Args:
            again: encodes the image once more, for a prompt that needs the attention.
        """
        light = self.fresh()
        light._paths, light._again = self.paths, again
        light.forget()
        return light

    def fresh(self) -> EncodedImage:
        """The same encoding for another call: shares what is known, has spent no time; what it adds stays its own."""
        other = copy.copy(self)
        other.seconds, other._kept = {}, dict(self._kept)
        return other

    def forget(self) -> None:
        """Drop all that can be worked out again; the attention too, where it can be recalled, but never the paths' steps."""
        self._distance = self._upsampler = None
        self._kept = {}
        if self._again is not None:
            self._attention = None
        else:
            self._salience = self._paths = None
            self._lasting = {}
