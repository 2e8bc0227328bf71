"""The benchmarks, one module each, which `evaluation.benchmark.open_benchmark` imports.

To add one, write its module with a `BENCHMARK` (`evaluation.benchmark`) and name it here.
"""

BENCHMARKS = (  # each the name of a module of this folder
    "coco_pose",
    "diode",
    "emoji_scenes",
    "emu_edit",
    "gedit",
    "geneval",
    "identity_set",
    "imgedit",
    "inpainting",
    "kitti_depth",
    "layout_boxes",
    "magicbrush",
    "mlperf_loss",
    "nyuv2",
    "phrasecut_seg",
    "refcoco_seg",
)
