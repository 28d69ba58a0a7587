"""Which image to label next: the ``Next Sample`` buttons of OHIF and 3D Slicer."""

from __future__ import annotations

import time
from abc import abstractmethod
from typing import Any

from monailabel.interfaces.tasks.strategy import Strategy

from lib.submissions import submitted

AGAIN_SECONDS = 3600
"""An image that was handed out is not handed out again for so long, unless all were: somebody may be drawing on it."""


class NextImage(Strategy):
    """A strategy that puts the unlabelled images in an order, and hands out the first that nobody has just been given."""

    def __call__(self, request: dict[str, Any], datastore) -> dict[str, Any] | None:
        """Choose the next image.

        Args:
            request: ``label_tag`` and ``labels`` as in MONAI Label, and the strategy's own options.
            datastore: of the app.

        Returns:
            ``id`` of the image, and what the strategy says of it; None when every image has its label.
        """
        done = set(submitted(datastore))
        unlabelled = datastore.get_unlabeled_images(request.get("label_tag"), request.get("labels"))
        images = sorted(set(unlabelled) - done)
        if not images:
            return None
        given = {image: handed_out(datastore, image) for image in images}
        fresh = [image for image in images if time.time() - given[image] > AGAIN_SECONDS]
        # Where all were handed out, the one that was so longest ago.
        pool = fresh or [min(images, key=lambda image: (given[image], image))]
        image, said = self.choose(pool, request, datastore)
        return {"id": image, **said}

    @abstractmethod
    def choose(self, images: list[str], request: dict[str, Any], datastore) -> tuple[str, dict[str, Any]]:
        """The image to label next, and what the answer says of the choice.

        Args:
            images: unlabelled, at least one, sorted by id.
            request: see the call.
            datastore: of the app.
        """


def handed_out(datastore, image: str) -> int:
    """When an image was last handed out by any strategy, in seconds since 1970; 0 for never."""
    given = datastore.get_image_info(image).get("strategy", {})
    return max((int(entry.get("ts", 0)) for entry in given.values()), default=0)
