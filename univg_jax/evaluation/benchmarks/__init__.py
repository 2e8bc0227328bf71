"""The benchmarks, one module each, which `evaluation.benchmark.open_benchmark` imports.

To add one, write its module with a `BENCHMARK` (`evaluation.benchmark`) and name it here.
"""

BENCHMARKS = (  # each the name of a module of this folder
    "coco30k",
    "coco_pose",
    "diode",
    "dpg",
    "dsg",
    "emoji_scenes",
    "emu_edit",
    "gedit",
    "geneval",
    "geneval2",
    "hpsv2",
    "identity_set",
    "imgedit",
    "inpainting",
    "kitti_depth",
    "layout_boxes",
    "longtext",
    "magicbrush",
    "mlperf_loss",
    "nyuv2",
    "parti",
    "phrasecut_seg",
    "refcoco_seg",
    "t2i_compbench",
)
