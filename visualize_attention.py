"""What every attention head looks at, as facebookresearch/dino's scripts for pictures and for video draw it, and more.

python visualize_attention.py --input photo.jpg --pretrained_weights dino_xcit_small_12_p16 --output_dir maps
python visualize_attention.py --input clip.mp4 --layout grid --pretrained_weights checkpoint.pth --output_dir maps
"""

from dino.attention.visualize import main

if __name__ == "__main__":
    main("visualize_attention.py")
