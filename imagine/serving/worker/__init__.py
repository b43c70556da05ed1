"""The part of the server that owns a device: it claims jobs, and denoises different people's pictures together."""
