# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults of the networks."""

from faults.fault import faults_in

_PAPERS = "tests/models/test_networks.py tests/models/test_papers.py tests/models/test_options.py"
NETWORKS = [
    *faults_in(
        "models/encoder.py",
        "tests/models/test_encoder.py",
        (
            "encoder-padding-stays",
            "HRNets: the map keeps what the padding of the image added",
            "x[:, :, : (height + stride - 1) // stride, : (width + stride - 1) // stride]",
            "x",
        ),
        (
            "encoder-multi-grid",
            "multi_grid replaces the dilation of the stage",
            "_dilate(convolution, dilation * factor)",
            "_dilate(convolution, factor)",
        ),
        (
            "encoder-stage-dilations",
            "stage_dilations: the first block of a stage has all of the dilation",
            "_dilate(blocks[0][0], max(1, dilation // 2))",
            "_dilate(blocks[0][0], dilation)",
        ),
    ),
    *faults_in(
        "models/base.py",
        "tests/models/test_networks.py tests/models/test_registry.py tests/models/test_options.py",
        (
            "network-auxiliary-in-evaluation",
            "evaluation pays for the auxiliary head",
            "if self.training and self.auxiliary is not None:",
            "if self.auxiliary is not None:",
        ),
        (
            "network-corners",
            "align_corners is ignored when the logits are resized",
            'F.interpolate(logits, size, mode="bilinear", align_corners=self.align_corners)',
            'F.interpolate(logits, size, mode="bilinear", align_corners=True)',
        ),
    ),
    *faults_in(
        "models/registry.py",
        "tests/models/test_registry.py",
        (
            "registry-sync-batchnorm",
            "sync_batchnorm is ignored",
            "    if sync_batchnorm:\n",
            "    if sync_batchnorm is None:\n",
        ),
        (
            "registry-shared-options",
            "what builder and network name reaches the builder alone",
            "shared |= {option: values[option] for option in _COMMON if option in values}",
            "shared |= {}",
        ),
        (
            "registry-defaults",
            "the defaults of a registration are ignored",
            "{**defaults, **entry.defaults}.items()",
            "defaults.items()",
        ),
        (
            "registry-encoder",
            "an argument beside an Encoder is dropped in silence",
            "if value != defaults[argument].default:",
            "if False:",
        ),
    ),
    *faults_in(
        "models/ann.py",
        "tests/models/test_ann.py",
        (
            "ann-dropout-without-fusion",
            "without a fusion there is a dropout more",
            "dropout if fusions else 0.0,",
            "dropout,",
        ),
    ),
    *faults_in(
        "models/danet.py",
        _PAPERS,
        (
            "danet-classifier",
            "the channel branch is judged by the classifier of the position branch",
            "self.channel_classifier(channel)",
            "self.position_classifier(channel)",
        ),
    ),
    *faults_in(
        "models/gff.py",
        "tests/models/test_gff.py",
        (
            "gff-context-level",
            "gated_fpn does not fuse the context map",
            '_PYRAMIDS = ("fpn", "gated_fpn")',
            '_PYRAMIDS = ("fpn",)',
        ),
    ),
    *faults_in(
        "models/mcibi.py",
        "tests/models/test_mcibi.py",
        (
            "mcibi-pyramid-top",
            "the feature pyramid stands on the context of the image alone",
            "self.pyramid(*maps[:-1], y)",
            "self.pyramid(*maps[:-1], within)",
        ),
        (
            "mcibi-features-attached",
            "the features for the memory keep the graph",
            'output.auxiliary["first"], output.features = first, r.detach()',
            'output.auxiliary["first"], output.features = first, r',
        ),
    ),
    *faults_in(
        "models/pspnet.py",
        _PAPERS + " tests/models/test_registry.py",
        (
            "pspnet-activation",
            "branch_activation=False is ignored",
            "activation=branch_activation,",
            "activation=True,",
        ),
    ),
    *faults_in(
        "models/deeplabv3.py",
        "tests/test_defaults.py tests/models/test_convert.py",
        (
            "deeplab-dilations",
            "the default dilations are those of output stride 16",
            "dilations: Sequence[int] = (12, 24, 36)",
            "dilations: Sequence[int] = (6, 12, 18)",
        ),
    ),
    *faults_in(
        "models/non_local.py",
        _PAPERS + " tests/models/test_convert.py",
        (
            "nonlocal-network-flag",
            "use_scale=False is ignored",
            "scale=key_channels**-0.5 if use_scale else 1.0,",
            "scale=key_channels**-0.5,",
        ),
    ),
    *faults_in(
        "models/fcn.py",
        _PAPERS + " tests/models/test_convert.py",
        (
            "fcn-convolutions",
            "there is one convolution more than convolutions says",
            "for i in range(convolutions)",
            "for i in range(convolutions + 1)",
        ),
        (
            "fcn-dilation",
            "the convolutions of an FCN are not dilated",
            "norm_layer, dilation=dilation)",
            "norm_layer)",
        ),
    ),
]
