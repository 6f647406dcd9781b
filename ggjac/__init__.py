"""ggjac: the exact linear map that a GGUF language model applies to one prompt."""
