"""The model's parts as ONNX graphs, built node by node from configurations and weights."""
