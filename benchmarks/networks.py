"""The networks that are timed, as arguments of diffusers' `UNet2DModel`.

Weights are random, because time does not depend on them. PyTorch's side writes
them (`pytorch_side.py save`), and ours reads them.
"""

DIGITS = dict(
    sample_size=16, in_channels=1, out_channels=1, layers_per_block=1,
    block_out_channels=[32, 64, 64], norm_num_groups=16, norm_eps=1e-6,
    act_fn="silu", freq_shift=1, flip_sin_to_cos=False, downsample_padding=0,
    attention_head_dim=None,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D"],
    up_block_types=["UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])

# google/ddpm-cifar10-32: 35.7 million parameters.
CIFAR10 = dict(
    sample_size=32, in_channels=3, out_channels=3, layers_per_block=2,
    block_out_channels=[128, 256, 256, 256], norm_num_groups=32, norm_eps=1e-6,
    act_fn="silu", freq_shift=1, flip_sin_to_cos=False, downsample_padding=0,
    attention_head_dim=None,
    down_block_types=["DownBlock2D", "AttnDownBlock2D", "DownBlock2D",
                      "DownBlock2D"],
    up_block_types=["UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"])

NETWORKS = {"digits": DIGITS, "cifar10": CIFAR10}

# The sampler of PyTorch's search step calls the network at times between these;
# any numbers would do.
TIMES_FROM, TIMES_TO = 900.0, 10.0
# The features of both sides are the means of squares of so many pixels a side.
POOL = 4
