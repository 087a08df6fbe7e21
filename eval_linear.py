"""Linear accuracy of frozen features, by facebookresearch/dino's protocol (`--protocol original`) or a fast one.

python eval_linear.py --pretrained_weights dino_xcit_small_12_p16 --data_path imagenet/
torchrun --nproc_per_node=8 eval_linear.py --protocol original --pretrained_weights checkpoint.pth --data_path imagenet/
"""

from dino.evaluation.eval_linear import main

if __name__ == "__main__":
    main("eval_linear.py")
