"""The networks (encoders, autoencoder, denoiser), the noise convention, and strict loading of weights."""
