"""ZeroSeg as a MONAI Label app: ``monailabel start_server --app monailabel_app --studies FOLDER_OR_DICOMWEB_URL``."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from dicomweb_client.session_utils import create_session_from_user_pass
from monailabel.config import settings
from monailabel.datastore.dicom import DICOMwebClientX
from monailabel.interfaces.app import MONAILabelApp

from lib.configs import tasks
from lib.datastore import FolderDatastore, StudyDatastore, search_filter
from lib.engine import Engine
from lib.mends import archives, authentication, background, dicom_seg, errors, files, ohif
from lib.mends.batch import CarefulBatch
from lib.mends.confidence import ConfidenceOutput
from lib.mends.errors import NotFound, Refused
from lib.mends.responsive import OffLoop
from zeroseg import __version__
from zeroseg.backbones import StableDiffusionBackbone

logger = logging.getLogger(__name__)

UNNAMED = "object"
"""The one segment that 3D Slicer starts a new image with until ``learned`` has labels of its own. No task declares it, so that no task
is run on every image by itself."""

TASKS = (tasks.segments, tasks.points, tasks.scribbles, tasks.text, tasks.tumor)


class ZeroSegApp(MONAILabelApp):
    """Zero-shot segmentation for OHIF and 3D Slicer.

    Args:
        app_dir: this folder.
        studies: a folder, or the URL of a DICOMweb server.
        conf: ``backbone`` (embedded, a folder or a hub id), ``revision``, ``device``, ``dtype``, ``cache_mb`` (memory for
            encoded slices, for encoded volumes of the tumour task and for images, each), ``threads`` (of torch),
            ``resolution`` (side in pixels a slice is resized to; a smaller one is faster and coarser).
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]):
        # Here, because a batch runs in a process of its own, which serves nothing.
        dicom_seg.install()
        if conf.get("threads"):
            torch.set_num_threads(int(conf["threads"]))
        backbone = StableDiffusionBackbone(
            source=conf.get("backbone", "embedded"),
            revision=conf.get("revision"),
            device=conf.get("device", "auto"),
            dtype=conf.get("dtype", "fp32"),
        )
        resolution = int(conf["resolution"]) if conf.get("resolution") else None
        self.engine = Engine(backbone, cache_bytes=int(conf.get("cache_mb", 1024)) << 20, resolution=resolution)
        super().__init__(
            app_dir,
            studies,
            conf,
            name="ZeroSeg",
            description="Zero-shot segmentation with a frozen diffusion model. Research use only.",
            version=__version__,
        )

    def init_infers(self) -> dict[str, Any]:
        made = {make.__name__: make(self.engine) for make in TASKS}
        return {name: task for name, task in made.items() if task is not None}

    def info(self) -> dict[str, Any]:
        """As MONAI Label's; ``labels`` are those 3D Slicer starts an image with, not the sum of all tasks'."""
        return {**super().info(), "labels": [UNNAMED]}

    def init_datastore(self):
        if self.studies.startswith(("http://", "https://")):
            return super().init_datastore()
        return FolderDatastore(
            self.studies,
            auto_reload=settings.MONAI_LABEL_DATASTORE_AUTO_RELOAD,
            read_only=settings.MONAI_LABEL_DATASTORE_READ_ONLY,
        )

    def _init_dicomweb_datastore(self):
        session = None
        if settings.MONAI_LABEL_DICOMWEB_USERNAME and settings.MONAI_LABEL_DICOMWEB_PASSWORD:
            session = create_session_from_user_pass(
                settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
            )
        client = DICOMwebClientX(
            url=self.studies,
            session=session,
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
        )
        # Else it takes 30 s until a user hears of it.
        client.set_http_retry_params(max_attempts=3, wait_exponential_multiplier=100)
        return StudyDatastore(
            client=client,
            search_filter=search_filter(),
            cache_path=settings.MONAI_LABEL_DICOMWEB_CACHE_PATH.strip() or None,
            fetch_by_frame=settings.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME,
        )

    def init_batch_infer(self):
        return CarefulBatch()

    def infer(self, request: dict[str, Any], datastore=None) -> dict[str, Any]:
        """Check what MONAI Label takes on trust, then run the task.

        Raises:
            NotFound: the model or the image is unknown.
            Refused: the image is a path, or the tag of the label to save is.
        """
        self.check_model(request.get("model"))
        image = request.get("image")
        if not isinstance(image, str) or not image:
            raise Refused("no image: name one of the datastore, a session that has not expired, or send a file")
        if Path(image).exists():
            if not _is_upload(Path(image), Path(self.sessions().store_path) if self.sessions() is not None else None):
                raise Refused("an image is named by its id in the datastore, not by a path")
        elif not errors.is_name(image):
            raise Refused(f"{image[:80]!r} is no valid name: names hold no folders")
        elif not (datastore or self.datastore()).get_image_uri(image):
            raise NotFound(f"there is no image {image!r} in the datastore")
        if not errors.is_name(str(request.get("label_tag", "original"))):
            raise Refused("label_tag is no valid name: names hold no folders")
        result = super().infer(request, datastore)
        dicom_seg.remember(result["params"])
        return result

    def bundle_path(self, model: str | None) -> None:
        """Path of a bundle to train, for MONAI Label's background tasks: no model here is one."""

    def check_background(self, method: str, request: dict[str, Any]) -> None:
        """Refuse a background task that cannot succeed.

        Args:
            method: train, scoring or batch_infer.
            request: what MONAI Label would start it with.

        Raises:
            NotFound: there is no such model or method.
        """
        if method == "batch_infer":
            self.check_model(request.get("model"))
        tasks_of = {"train": ("model", self._trainers), "scoring": ("method", self._scoring_methods)}
        if method in tasks_of:
            key, known = tasks_of[method]
            if request.get(key) not in known:
                names = ", ".join(known) or "none"
                raise NotFound(f"{method}: there is no {key} {str(request.get(key))[:80]!r}, the server has {names}")

    def check_model(self, model: Any) -> None:
        if model not in self._infers:
            raise NotFound(f"there is no model {str(model)[:80]!r}: use one of {', '.join(self._infers)}")

    def on_init_complete(self) -> None:
        super().on_init_complete()
        from monailabel.app import app  # only a server has one, and it is built by now

        authentication.install()
        background.install()
        ohif.install()
        files.install()
        archives.install()
        errors.install(app.middleware_stack)
        app.middleware_stack = errors.RefusingPaths(OffLoop(ConfidenceOutput(app.middleware_stack)))


def _is_upload(path: Path, sessions: Path | None) -> bool:
    """Whether a path is one that the server itself made for an upload: a file of this request, or one of a session."""
    return files.is_of_this_request(path) or (
        sessions is not None and path.resolve().is_relative_to(sessions.resolve())
    )
