"""k-NN accuracy of frozen features, as facebookresearch/dino's script of this name prints it, and more.

python eval_knn.py --pretrained_weights dino_xcit_small_12_p16 --data_path imagenet/
torchrun --nproc_per_node=8 eval_knn.py --pretrained_weights checkpoint.pth --data_path imagenet/
"""

from dino.evaluation.eval_knn import main

if __name__ == "__main__":
    main("eval_knn.py")
