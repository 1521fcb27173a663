"""nnssl_ext: self-configuring self-supervised pretraining of 3D medical images."""

__version__ = "0.1.0"
