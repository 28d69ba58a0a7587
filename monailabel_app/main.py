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
from monailabel.utils.async_tasks.utils import tasks as background_tasks

from lib import rtstruct
from lib.configs import tasks
from lib.datastore import FolderDatastore, StudyDatastore, search_filter
from lib.engine import Engine
from lib.heads import FOLDER, Heads
from lib.mends import archives, authentication, background, dicom_seg, errors, files, ohif
from lib.mends.batch import CarefulBatch
from lib.mends.confidence import ConfidenceOutput
from lib.mends.errors import NotFound, Refused
from lib.mends.limits import upload_limit
from lib.mends.responsive import OffLoop
from lib.scoring.learned import LearnedScore
from lib.strategies.measured import Diverse, Uncertain
from lib.strategies.plain import First, Random
from lib.trainers.learned import LearnedTrainer, give_way
from zeroseg import __version__
from zeroseg.backbones import StableDiffusionBackbone

logger = logging.getLogger(__name__)

STRATEGY = "uncertain"
"""What ``random`` means unless the server was started with another strategy."""
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
            ``resolution`` (side in pixels a slice is resized to; a smaller one is faster and coarser), ``strategy`` (the
            answer to ``random``, which is all that OHIF asks for).

    Raises:
        Refused: there is no such strategy.
        ZeroSegError: the environment sets a limit that is none.
    """

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]):
        # Here, because a batch runs in a process of its own, which serves nothing.
        dicom_seg.install()
        # Else every request would fail.
        upload_limit()
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
        self.serves = False
        self.off_loop: OffLoop | None = None
        self.strategy = conf.get("strategy", STRATEGY)
        super().__init__(
            app_dir,
            studies,
            conf,
            name="ZeroSeg",
            description="Zero-shot segmentation with a frozen diffusion model. Research use only.",
            version=__version__,
        )
        if self._strategies and self.strategy not in self._strategies:
            raise Refused(f"there is no strategy {self.strategy!r}: use one of {', '.join(self._strategies)}")

    def init_infers(self) -> dict[str, Any]:
        self.heads = Heads(Path(self._datastore._datastore_path) / FOLDER, self.engine)
        made = {make.__name__: make(self.engine) for make in TASKS}
        # First, because viewers start with the first task they can.
        return {
            "learned": tasks.learned(self.engine, self.heads),
            **{n: task for n, task in made.items() if task is not None},
        }

    def init_trainers(self) -> dict[str, Any]:
        return {"learned": LearnedTrainer(self.engine, self.heads)}

    def init_strategies(self) -> dict[str, Any]:
        return {
            "uncertain": Uncertain(self.engine, self.heads),
            "diverse": Diverse(self.engine),
            "first": First(),
            "random": Random(),
        }

    def init_scoring_methods(self) -> dict[str, Any]:
        return {"learned": LearnedScore(self.engine, self.heads)}

    def info(self) -> dict[str, Any]:
        """As MONAI Label's; ``labels`` are those 3D Slicer starts an image with, not the sum of all tasks'.

        ``rtstruct`` says whether a label can be saved as contours as well; ``queue`` holds the inferences that run or wait, see
        ``responsive.OffLoop.queue``.
        """
        learned = self._infers["learned"].labels
        remote = self.studies.startswith(("http://", "https://"))
        return {
            **super().info(),
            "labels": [*learned] or [UNNAMED],
            "rtstruct": remote and rtstruct.available(),
            "queue": self.off_loop.queue() if self.off_loop is not None else [],
        }

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
        if method == "train":
            self._trainers[request["model"]].check(request, self.datastore())

    def train(self, request: dict[str, Any]) -> dict[str, Any]:
        """As MONAI Label's, in its process for trainings, which gives way to the server."""
        if not self.serves:
            give_way()
        return super().train(request)

    def scoring(self, request: dict[str, Any], datastore=None) -> dict[str, Any]:
        """As MONAI Label's, in its process for scoring, which gives way to the server."""
        if not self.serves:
            give_way()
        return super().scoring(request, datastore)

    def async_scoring(self, method: str | None, params: dict | None = None) -> Any:
        """As MONAI Label's, which scores whenever it starts and at every next image: here, of itself, every head once."""
        record = self.heads.record()
        waiting = any(one["status"] in ("SUBMITTED", "RUNNING") for one in background_tasks("scoring"))
        if method is None and (record is None or waiting or self.heads.scores().get("head") == record["name"]):
            return {}
        return super().async_scoring(method, params)

    def next_sample(self, request: dict[str, Any]) -> dict[str, Any]:
        """As MONAI Label's; ``random`` is the strategy that the server was started with.

        Raises:
            NotFound: there is no such strategy.
        """
        strategy = request.get("strategy") or "random"
        if strategy not in self._strategies:
            raise NotFound(f"there is no strategy {str(strategy)[:80]!r}: use one of {', '.join(self._strategies)}")
        return super().next_sample({**request, "strategy": self.strategy if strategy == "random" else strategy})

    def check_model(self, model: Any) -> None:
        known = [name for name, task in self._infers.items() if task.is_valid()]
        if model == "learned" and model not in known:
            raise NotFound("nothing was learned yet: submit labels, then train (Update Model, or POST /train/learned)")
        if model not in known:
            raise NotFound(f"there is no model {str(model)[:80]!r}: use one of {', '.join(known)}")

    def on_init_complete(self) -> None:
        self.serves = True
        super().on_init_complete()
        from monailabel.app import app  # only a server has one, and it is built by now

        authentication.install()
        background.install()
        ohif.install()
        files.install()
        archives.install()
        errors.install(app.middleware_stack)
        if self.sessions() is not None:
            errors.hide(self.sessions().store_path)
        self.off_loop = OffLoop(ConfidenceOutput(app.middleware_stack))
        app.middleware_stack = errors.RefusingPaths(self.off_loop)


def _is_upload(path: Path, sessions: Path | None) -> bool:
    """Whether a path is one that the server itself made for an upload: a file of this request, or one of a session."""
    return files.is_of_this_request(path) or (
        sessions is not None and path.resolve().is_relative_to(sessions.resolve())
    )
