"""What the student minimises: cross-entropy with the teacher's targets, and KoLeo for small data.

V = student's views, T = teacher's views (the first T of the student's), B = images, K = prototypes, C = channels
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def dino_loss(student_VBK: Tensor, targets_TBK: Tensor, temperature: float) -> Tensor:
    """Mean cross-entropy over all pairs of a teacher's view and a different student's view (DINO, eq. 2, 3).

    Args:
        student_VBK: the student's logits; its first T views are those that the teacher saw.
        targets_TBK: the teacher's probabilities, without gradient.
        temperature: of the student's softmax.

    Returns:
        A float32 scalar, ln K when the student's output is uniform.

    Raises:
        ValueError: fewer than two views leave no pair of different ones.
    """
    if len(student_VBK) < 2:
        raise ValueError(f"the loss compares different views: at least 2 are needed, got {len(student_VBK)}")
    log_p_VBK = F.log_softmax(student_VBK.float() / temperature, dim=-1)
    images = student_VBK.shape[1]
    cross_entropy_TV = -torch.einsum("tbk,vbk->tv", targets_TBK, log_p_VBK) / images
    same_view_TV = torch.eye(*cross_entropy_TV.shape, dtype=torch.bool, device=log_p_VBK.device)
    return cross_entropy_TV[~same_view_TV].mean()


def koleo_loss(features_BC: Tensor) -> Tensor:
    """Kozachenko-Leonenko regulariser: minus the mean log distance to the nearest other picture.

    Spreads the features over the sphere (Sablayrolles et al. 2019, eq. 3; DINOv2, section 4).

    Args:
        features_BC: features of different pictures, one view each; they are L2-normalised here.

    Returns:
        A float32 scalar; 0 for a single picture, which has no neighbour.
    """
    if len(features_BC) < 2:
        return features_BC.float().sum() * 0.0
    unit_BC = F.normalize(features_BC.float(), dim=-1)
    with torch.no_grad():
        similarity_BB = unit_BC @ unit_BC.T
        nearest_B = similarity_BB.fill_diagonal_(-torch.inf).argmax(dim=1)
    # The small constant keeps log and its gradient finite for identical pictures.
    distance_B = F.pairwise_distance(unit_BC, unit_BC[nearest_B], eps=1e-8)
    return -(distance_B + 1e-8).log().mean()
