# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults of the importers of other code's checkpoints."""

from faults.fault import faults_in

_IMPORT = (
    "tests/models/test_convert.py tests/models/test_convert_mmsegmentation.py "
    "tests/models/test_convert_sssegmentation.py tests/models/test_convert_torchvision.py"
)
IMPORTERS = [
    *faults_in(
        "models/importers/mmsegmentation.py",
        _IMPORT,
        (
            "importer-dnlnet-swapped",
            "DNLNet: the weights of query and key are exchanged",
            '"decode_head.dnl_block.theta.conv": "decoder.context.1.query",\n'
            '            "decode_head.dnl_block.phi.conv": "decoder.context.1.key",',
            '"decode_head.dnl_block.theta.conv": "decoder.context.1.key",\n'
            '            "decode_head.dnl_block.phi.conv": "decoder.context.1.query",',
        ),
    ),
    *faults_in(
        "models/importers/importer.py",
        _IMPORT,
        (
            "importer-hrnet-branches",
            "HRNets: the branches are resized to the nearest",
            '"output_stride": 4, "bilinear_branches": True}',
            '"output_stride": 4, "bilinear_branches": False}',
        ),
        (
            "importer-pools-on-shortcuts",
            "the shortcuts of dilated stages keep timm's pooling in imported ResNets",
            'arguments["shortcut_pools"] = False',
            'arguments["shortcut_pools"] = True',
        ),
        (
            "importer-basic-blocks",
            "mmsegmentation's ResNet-18 and -34: both convolutions of a block are dilated",
            'arguments["dilate_both"] = False',
            'arguments["dilate_both"] = True',
        ),
        (
            "importer-aspp-order",
            "sssegmentation: ASPP's fusion takes the branches in their order",
            "weight.roll(weight.shape[0], dims=1)",
            "weight.roll(0, dims=1)",
        ),
    ),
    *faults_in(
        "models/importers/sssegmentation.py",
        "tests/models/test_convert_sssegmentation.py",
        (
            "importer-psanet-swapped",
            "sssegmentation's PSANet: the masks of collection and distribution are exchanged",
            '{"attention.3": f"{_PSA}.collect.1", "attention_p.3": f"{_PSA}.distribute.1"}',
            '{"attention.3": f"{_PSA}.distribute.1", "attention_p.3": f"{_PSA}.collect.1"}',
        ),
        (
            "importer-mcibi-aspp-order",
            "MCIBI over ASPP: its fusion takes the branches in sssegmentation's order",
            '        {"within.fuse.0.weight": image_branch_first},\n',
            "",
        ),
        (
            "importer-mcibi-memory",
            "MCIBI: the memory keeps an axis of sssegmentation, so no file is read",
            "return memory[:, 0] if memory.dim() == 3",
            "return memory if memory.dim() == 3",
        ),
        (
            "importer-sssegmentation-corners",
            "sssegmentation's networks are built with align_corners=True",
            '"align_corners": False,',
            '"align_corners": True,',
        ),
    ),
    *faults_in(
        "models/importers/segmentation_models_pytorch.py",
        "tests/models/test_convert_torchvision.py",
        (
            "importer-pyramid-order",
            "segmentation_models.pytorch's PSPNet: the fusion takes the map for the branches",
            "weight.roll(weight.shape[1] // 2, dims=1) if weight.dim() == 4 else weight",
            "weight",
        ),
        (
            "importer-contracted",
            "segmentation_models.pytorch: the first block of a stage has half the dilation",
            '"contract_dilation": False,',
            '"contract_dilation": True,',
        ),
    ),
    *faults_in(
        "models/importers/torchvision.py",
        "tests/models/test_convert_torchvision.py",
        (
            "importer-lraspp",
            "torchvision's LR-ASPP is refused as a file of nobody's",
            '("backbone.", "classifier.cbr.")',
            '("backbone.", "classifier.low_classifier.cbr.")',
        ),
    ),
    *faults_in(
        "models/importers/mmsegmentation_config.py",
        _IMPORT,
        (
            "importer-corners",
            "mmsegmentation's networks are built with align_corners=True",
            '"align_corners": head.get("align_corners", False),\n        "dropout"',
            '"align_corners": head.get("align_corners", True),\n        "dropout"',
        ),
        (
            "config-classes",
            "a configuration's head may be another than the checkpoint's",
            'if _type(part) not in values["type"]:',
            'if "type" not in part:',
        ),
        (
            "config-multi-grid",
            "a configuration's multi-grid multiplies the dilation of the stage",
            "dilations = (*dilations[:3], 1)",
            "dilations = (*dilations[:3], dilations[3])",
        ),
        (
            "config-unknown",
            "arguments of a configuration that nothing here knows are ignored",
            "wrong += [argument for argument in part if argument not in known]",
            "wrong += [argument for argument in part if argument in ()]",
        ),
        (
            "config-statements",
            "a configuration's statements other than assignments are ignored",
            "names |= dict.fromkeys(mentioned, ",
            "names | dict.fromkeys(mentioned, ",
        ),
    ),
    *faults_in(
        "models/encoder.py",
        _IMPORT,
        (
            "encoder-hrnet-factors",
            "HRNets: a coarser branch is cut to the finer one's size, not resized",
            "resize(layer(x), like.shape[2:], align_corners=False)\n",
            "layer(x)[:, :, : like.shape[2], : like.shape[3]]\n",
        ),
    ),
    *faults_in(
        "models/importers/released_gald.py",
        _IMPORT,
        (
            "importer-gald-swapped",
            "GALD: the weights of theta and phi are exchanged",
            'theta",\n            "head.a2block.long_relation.p": '
            '"decoder.context.1.global_aggregation.phi"',
            'phi",\n            "head.a2block.long_relation.p": '
            '"decoder.context.1.global_aggregation.theta"',
        ),
        (
            "importer-gald-multi-grid",
            "GALD: imported without its multi-grid",
            '            "multi_grid": (1, 2, 4),\n',
            "",
        ),
    ),
    *faults_in(
        "models/convert.py",
        _IMPORT,
        (
            "convert-unexpected",
            "weights that the network has no place for are dropped in silence",
            "if missing or unexpected or misshapen:\n        raise _misfit",
            "if missing or misshapen:\n        raise _misfit",
        ),
        (
            "convert-names",
            "the error about weights too many spells our names, not theirs",
            "else unexpected).append(theirs)",
            "else unexpected).append(ours)",
        ),
        (
            "convert-unused",
            "load_backbone does not say what it left out of a whole network",
            "return [*unused, *others]",
            "return [*unused]",
        ),
        (
            "convert-averaged",
            "the averaged copies in a state dict are not taken",
            "tensors |= {name: tensors.pop(copy)",
            "tensors |= {copy: tensors.pop(copy)",
        ),
    ),
    *faults_in(
        "models/checksum.py",
        _IMPORT,
        (
            "check-range",
            "the image of a check is not divided by 255",
            "pixels / 255 - mean",
            "pixels - mean",
        ),
        (
            "check-classes",
            "a check counts the least likely class of each pixel",
            "logits.argmax(1)",
            "logits.argmin(1)",
        ),
    ),
    *faults_in(
        "models/checkpoint_files.py",
        _IMPORT,
        (
            "convert-unpickles",
            "a checkpoint may run code",
            "weights_only=True",
            "weights_only=False",
        ),
        (
            "convert-protocol",
            "a file of a newer protocol of pickle is refused for the wrong reason",
            "_PROTOCOLS = (2, 3)",
            "_PROTOCOLS = (2, 3, 4)",
        ),
        (
            "convert-legacy-objects",
            "objects in a file of an old torch are not found",
            "return pickles[-1]",
            "return pickles[0]",
        ),
    ),
]
