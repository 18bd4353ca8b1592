"""The MLX backend; `backend.MlxBackend` is its entry point."""
