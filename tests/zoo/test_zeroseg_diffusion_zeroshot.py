"""Unit test in the form of MONAI's Model Zoo: copied to its ``ci/unit_tests/`` it runs there as it is.

There the bundle is ``models/zeroseg_diffusion_zeroshot``, as ``make zoo`` builds it; here it is this repository's ``bundle``.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
import tempfile
import unittest
from pathlib import Path

import numpy as np
from monai.bundle import ConfigWorkflow
from PIL import Image

IN_THE_ZOO = "models/zeroseg_diffusion_zeroshot"
BUNDLE_ROOT = IN_THE_ZOO if os.path.isdir(IN_THE_ZOO) else str(Path(__file__).resolve().parents[2] / "bundle")


class TestZeroSegDiffusionZeroshot(unittest.TestCase):
    def setUp(self):
        self.folder = tempfile.mkdtemp()
        y, x = np.mgrid[:64, :96]
        self.disc = (x - 60) ** 2 + (y - 28) ** 2 < 14**2
        os.mkdir(os.path.join(self.folder, "images"))
        Image.fromarray(np.where(self.disc, 200, 60).astype(np.uint8)).save(f"{self.folder}/images/disc.png")
        Path(self.folder, "prompts.json").write_text(json.dumps({"disc": {"points": [[60, 28]]}}))
        sys.path.insert(0, BUNDLE_ROOT)

    def tearDown(self):
        sys.path.remove(BUNDLE_ROOT)
        shutil.rmtree(self.folder)

    def test_infer_config(self):
        inferrer = ConfigWorkflow(
            workflow_type="infer",
            config_file=os.path.join(BUNDLE_ROOT, "configs/inference.yaml"),
            logging_file=os.path.join(BUNDLE_ROOT, "configs/logging.conf"),
            meta_file=os.path.join(BUNDLE_ROOT, "configs/metadata.json"),
            bundle_root=BUNDLE_ROOT,
            dataset_dir=f"{self.folder}/images",
            output_dir=f"{self.folder}/out",
            prompts=f"{self.folder}/prompts.json",
            device="cpu",
            resolution=128,
        )
        inferrer.initialize()
        self.assertFalse(inferrer.check_properties())
        inferrer.run()
        inferrer.finalize()
        found = np.asarray(Image.open(f"{self.folder}/out/disc_seg.png")) > 0
        self.assertEqual(found.shape, self.disc.shape)
        self.assertGreater(2 * (found & self.disc).sum() / (found.sum() + self.disc.sum()), 0.8)


if __name__ == "__main__":
    unittest.main()
