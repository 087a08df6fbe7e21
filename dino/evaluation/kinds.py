"""The kinds of features that a backbone has to offer. Imports no torch, so that `--help` answers at once."""

CLASS_TOKEN = "cls"  # after the final norm; of a network without one, its pooled feature
PATCH_MEAN = "patch_mean"  # mean of the patch tokens after the final norm
LAST_BLOCKS = (
    "cls_last_4"  # of a ViT: class tokens of the last blocks, each after the final norm, side by side
)
PATCH_TOKENS = "patch_tokens"  # all of them, after the final norm

LAST_BLOCKS_COUNT = 4  # as in DINO's linear evaluation of ViT-S

KINDS = (CLASS_TOKEN, PATCH_MEAN, LAST_BLOCKS, PATCH_TOKENS)
