"""The PyTorch backend; `backend.TorchBackend` is its entry point."""
