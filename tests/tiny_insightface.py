"""Packs of insightface at tiny sizes: ONNX graphs that its own classes load.

The detector finds a face in every bright cell of 32 x 32 pixels, whatever it shows.
"""

import importlib
from pathlib import Path
from typing import Any

import numpy as np


def tiny_detector(path: Path, side: int = 64, landmarks: bool = False) -> Path:
    """Write an SCRFD graph that reports a face wherever a 32 x 32 cell of a picture of `side` pixels is bright."""
    onnx = importlib.import_module("onnx")
    helper, numpy_helper = onnx.helper, onnx.numpy_helper
    nodes, constants, outputs = [], [], []

    def constant(name: str, values: Any, dtype: Any = np.float32) -> str:
        constants.append(numpy_helper.from_array(np.asarray(values, dtype), name))
        return name

    counts = {stride: 2 * (side // stride) ** 2 for stride in (8, 16, 32)}
    nodes.append(helper.make_node("AveragePool", ["input"], ["cells"], kernel_shape=[32, 32], strides=[32, 32]))
    nodes.append(helper.make_node("ReduceMean", ["cells", constant("channels", [1], np.int64)], ["bright"], keepdims=1))
    nodes.append(helper.make_node("Reshape", ["bright", constant("column", [-1, 1], np.int64)], ["flat"]))
    nodes.append(helper.make_node("Concat", ["flat", "flat"], ["anchors"], axis=1))
    nodes.append(helper.make_node("Reshape", ["anchors", "column"], ["tall"]))
    nodes.append(helper.make_node("Mul", ["tall", constant("gain", 8.0)], ["steep"]))
    nodes.append(helper.make_node("Sigmoid", ["steep"], ["score_32"]))
    for stride in (8, 16):
        empty = constant(f"none_{stride}", np.zeros((counts[stride], 1)))
        nodes.append(helper.make_node("Identity", [empty], [f"score_{stride}"]))
    # Relative to the cell's corner, in strides: a box of the middle half, and plausible eyes, nose and mouth.
    marks = [0.1, 0.1, 0.4, 0.1, 0.25, 0.25, 0.12, 0.4, 0.38, 0.4]
    reaches = {"box": [-0.25, -0.25, 0.75, 0.75], **({"mark": marks} if landmarks else {})}
    for kind, reach in reaches.items():
        for stride, count in counts.items():
            rows = constant(f"{kind}_rows_{stride}", np.tile(reach, (count, 1)))
            nodes.append(helper.make_node("Identity", [rows], [f"{kind}_{stride}"]))
    for kind, width in {"score": 1, **{kind: len(reach) for kind, reach in reaches.items()}}.items():
        outputs += [helper.make_tensor_value_info(f"{kind}_{s}", 1, [counts[s], width]) for s in counts]
    picture = helper.make_tensor_value_info("input", 1, [1, 3, side, side])
    return _save(onnx, helper.make_graph(nodes, "tiny", [picture], outputs, constants), path)


def tiny_recogniser(path: Path) -> Path:
    """Write a recogniser that returns the mean of each colour."""
    onnx = importlib.import_module("onnx")
    helper = onnx.helper
    nodes = [helper.make_node("GlobalAveragePool", ["input"], ["embedding"])]
    ends = [helper.make_tensor_value_info("input", 1, [1, 3, 112, 112])]
    outputs = [helper.make_tensor_value_info("embedding", 1, [1, 3, 1, 1])]
    return _save(onnx, helper.make_graph(nodes, "tiny", ends, outputs), path)


def tiny_pack(folder: Path, landmarks: bool = True, recogniser: bool = True) -> Path:
    """Write a detector with landmarks, and an ArcFace recogniser of 16 random projections of the crop."""
    onnx = importlib.import_module("onnx")
    helper = onnx.helper
    tiny_detector(folder / "det.onnx", landmarks=landmarks)
    if recogniser:
        crop = helper.make_tensor_value_info("input", 1, ["N", 3, 112, 112])
        pooled = helper.make_node("AveragePool", ["input"], ["pooled"], kernel_shape=[28, 28], strides=[28, 28])
        flat = helper.make_node("Flatten", ["pooled"], ["rows"])
        projection = np.random.default_rng(0).normal(size=(48, 16)).astype(np.float32)
        mixing = onnx.numpy_helper.from_array(projection, "mixing")
        product = helper.make_node("MatMul", ["rows", "mixing"], ["embedding"])
        ends = [helper.make_tensor_value_info("embedding", 1, ["N", 16])]
        _save(onnx, helper.make_graph([pooled, flat, product], "tiny", [crop], ends, [mixing]), folder / "w600k.onnx")
    return folder


def _save(onnx: Any, graph: Any, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=9), path)
    return path
