"""XCiT backbones and their weights; knows nothing of how they are trained."""

from xcit.model import XCiT
from xcit.weights import LoadReport, WeightsError, load_weights
from xcit.zoo import create_model, list_models

__all__ = ["LoadReport", "WeightsError", "XCiT", "create_model", "list_models", "load_weights"]
