"""Turns open reasoning distills into ONNX bundles that onnxruntime-genai opens."""

__version__ = "0.1.0"
