"""XCiT backbones and their weights; knows nothing of how they are trained."""

from xcit.model import XCiT
from xcit.pyramid import Pyramid
from xcit.weights import LoadReport, WeightsError, load_weights
from xcit.zoo import create_model, create_pyramid, list_models

__all__ = [
    "LoadReport",
    "Pyramid",
    "WeightsError",
    "XCiT",
    "create_model",
    "create_pyramid",
    "list_models",
    "load_weights",
]
