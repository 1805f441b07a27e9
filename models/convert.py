# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of other code as networks of this package: names, options, files."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ctxops._checks import check_known
from ctxops.models.base import SegmentationNetwork
from ctxops.models.checkpoint_files import read
from ctxops.models.encoder import Encoder
from ctxops.models.importers import IMPORTERS, REFUSED
from ctxops.models.importers.importer import STEM, Importer, MissingKeyError, Shapes
from ctxops.models.importers.mmsegmentation_config import load_config, parse_config
from ctxops.models.registry import create_model
from ctxops.nn.non_local import NonLocalBlock

# How many names an error spells out.
_SPELLED = 5

# What a state dict is wrapped in, and one of averaged weights; what training puts before its names.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_AVERAGED = ("state_dict_ema", "model_ema", "ema")
_PREFIXES = ("module.", "_orig_mod.")

# What a whole network puts before the names of its backbone; the last one is ours.
_BACKBONES = ("backbone.", "backbone_net.", "encoder.", "encoder.body.")

# What training frameworks add to a state dict: mmengine the image's mean and deviation, mmcv a copy
# of each tensor, averaged, with underscores for the dots of its name.
_PREPROCESSOR = "data_preprocessor."
_COPY = "ema_"

# Where OpenMMLab's training, 1.x and 0.x, writes the text of its configuration.
_CONFIGS = ("cfg", "config")

# What our own files hold of an imported network.
_SAVED = ("model", "arguments", "state_dict")

_LEAVES = r"(?:\.(?:weight|bias|running_mean|running_var|num_batches_tracked))?"


@dataclasses.dataclass
class ImportedModel:
    """A network of this package with the weights of another's checkpoint.

    Attributes:
        source: whose names the checkpoint had.
        model: what :func:`create_model` calls the network.
        arguments: further arguments of :func:`create_model`.
        state_dict: the network's, complete.
        zeros: its names that the checkpoint has no counterpart of, and that are zero without a
            change to what is computed: biases before a norm, counts of batches and of a memory's
            steps.
        left_out: names of the checkpoint that the logits do not depend on: averaged copies, what
            normalises images, layers that the original holds and does not call.
        assumed: those of the arguments that neither shapes nor a configuration told, nor the
            caller: the source's usual ones.
    """

    source: str
    model: str
    arguments: dict[str, Any]
    state_dict: dict[str, Tensor]
    zeros: list[str]
    left_out: list[str] = dataclasses.field(default_factory=list)
    assumed: dict[str, Any] = dataclasses.field(default_factory=dict)

    def build(self) -> SegmentationNetwork:
        """The network with these weights, in evaluation mode."""
        network = create_model(self.model, **self.arguments)
        network.load_state_dict(self.state_dict)
        return network.eval()

    def save(self, path: str | os.PathLike) -> None:
        """Writes what :func:`load_model` reads."""
        saved = {name: getattr(self, name) for name in _SAVED}
        # torch.save's own error for a folder that does not exist is no OSError.
        with open(path, "wb") as file:
            torch.save(saved, file)


def import_checkpoint(
    state_dict: Mapping[str, Tensor],
    *,
    source: str | None = None,
    model: str | None = None,
    config: str | Mapping[str, Any] | None = None,
    **options,
) -> ImportedModel:
    """Maps a checkpoint of other code onto a network of this package, strictly.

    Every key of the checkpoint is used and every key of the network filled, or it raises; only what
    training frameworks add is left out, and named. The imported network computes what the original
    does; images are normalised as there.

    Args:
        state_dict: as the other code saved it: ``load_checkpoint(path)``.
        source: whose code: ``"mmsegmentation"`` (1.x, ResNet backbones, ``fcn`` and ``ocrnet`` also
            HRNets; the checkpoints of 0.x have the same names), ``"sssegmentation"``,
            ``"torchvision"``, ``"segmentation_models.pytorch"``, ``"ann"``, ``"gald"`` (the code
            released with these papers). None: told from the names.
        model: what the network is called here. None: told from the names.
        config: mmsegmentation's configuration, which tells what shapes do not: its text, as
            checkpoints hold it, or what :func:`load_config` read from a file. Nothing in it runs.
            None: the usual one is assumed, and ``assumed`` of the result says what that is.
        options: arguments of :func:`create_model` that shapes do not tell, such as
            ``output_stride=16``, in the place of the configuration's or the usual ones.

    Raises:
        ImportError: timm is missing.
        ValueError: an unknown source, model or option, or a checkpoint of another architecture: the
            message names the first keys that are missing and that nothing takes. A configuration
            of something that no option gives: the message names all of that.
    """
    state_dict = _strip_prefixes(state_dict)
    left_out = [*_copies(state_dict), *(n for n in state_dict if n.startswith(_PREPROCESSOR))]
    state_dict = {name: x for name, x in state_dict.items() if name not in left_out}
    importer = _choose(state_dict, source, model)
    renamed, unexpected = _rename(state_dict, importer)
    for name in importer.transforms.keys() & renamed.keys():
        renamed[name] = importer.transforms[name](renamed[name])
    if isinstance(config, str):
        config = parse_config(config)
    if config is not None and importer.untold is None:
        raise ValueError(f"checkpoints of {importer.source} have no config: leave it out")
    shapes = Shapes(state_dict)
    try:
        untold = {} if importer.untold is None else importer.untold(shapes, config)
        arguments = importer.arguments(shapes) | untold | options
    except MissingKeyError as error:
        raise _misfit(importer, missing=[error.name], unexpected=unexpected) from None
    with torch.device("meta"):
        network = create_model(importer.model, **arguments)
    for name, module in network.named_modules():
        if isinstance(module, NonLocalBlock):
            module.merge_twins(renamed, f"{name}.")
    expected = network.state_dict()
    zeros = [
        name
        for name in expected.keys() - renamed.keys()
        if name.endswith(".num_batches_tracked") or name in importer.zeros
    ]
    renamed |= {name: torch.zeros_like(expected[name], device="cpu") for name in zeros}
    extra = renamed.keys() - expected.keys()
    for theirs, ours in _renamings(state_dict, importer):
        if ours in extra:
            (left_out if theirs.startswith(importer.spare) else unexpected).append(theirs)
    missing = [name for name in expected if name not in renamed]
    misshapen = [
        f"{name} {tuple(renamed[name].shape)} instead of {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in renamed and not _fits(renamed[name], tensor)
    ]
    if missing or unexpected or misshapen:
        raise _misfit(importer, missing, unexpected, misshapen)
    filled = {n: renamed[n].detach().reshape(tensor.shape) for n, tensor in expected.items()}
    network.load_state_dict(filled, assign=True)
    assumed = {n: x for n, x in untold.items() if config is None and n not in options}
    return ImportedModel(
        importer.source, importer.model, arguments, filled, sorted(zeros), left_out, assumed
    )


def load_checkpoint(path: str | os.PathLike, *, ema: bool = False) -> dict[str, Tensor]:
    """The state dict in a file, without what frameworks wrap it in. Nothing in the file runs.

    Args:
        path: a file of ``torch.save``, or one whose name ends in ``.safetensors``.
        ema: take the weights that training averaged, in the place of the last ones.

    Raises:
        OSError: no such file.
        ValueError: a damaged file, one of another kind or without a state dict, or ``ema`` of one
            without averaged weights.
    """
    return _state_dict(read(path), path, ema)


def _state_dict(loaded: object, path: str | os.PathLike, ema: bool) -> dict[str, Tensor]:
    averaged = _unwrap(loaded, _AVERAGED) if ema else None
    loaded = loaded if averaged is None else averaged
    while (inner := _unwrap(loaded, _WRAPPERS)) is not None:
        loaded = inner
    tensors = _tensors(loaded) if isinstance(loaded, Mapping) else {}
    if not tensors or not all(isinstance(name, str) for name in tensors):
        raise ValueError(f"{os.fspath(path)!r} holds no state dict: names, each with a tensor")
    if ema and averaged is None:
        copies = _copies(tensors)
        if not copies:
            raise ValueError(f"{os.fspath(path)!r} has no averaged weights: leave out ema")
        tensors |= {name: tensors.pop(copy) for copy, name in copies.items()}
    return tensors


def _unwrap(loaded: object, names: Sequence[str]) -> Mapping | None:
    """What is under the first of these names, if one of them holds a mapping."""
    inner = (loaded.get(name) for name in names if isinstance(loaded, Mapping))
    return next((each for each in inner if isinstance(each, Mapping)), None)


def _copies(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """From averaged copies in a state dict to the names that they are copies of."""
    names = {_COPY + name.replace(".", "_"): name for name in tensors}
    return {copy: name for copy, name in names.items() if copy in tensors}


def _config(loaded: object) -> str | None:
    """The text of the configuration in a checkpoint of OpenMMLab's training."""
    meta = _unwrap(loaded, ("meta",)) or {}
    return next((meta[name] for name in _CONFIGS if isinstance(meta.get(name), str)), None)


def convert_checkpoint(
    path: str | os.PathLike,
    converted: str | os.PathLike,
    *,
    ema: bool = False,
    config: str | os.PathLike | None = None,
    **arguments,
) -> ImportedModel:
    """Reads other code's checkpoint and writes a file for :func:`load_model`.

    Args:
        path: the checkpoint.
        converted: the file to write.
        ema: of :func:`load_checkpoint`.
        config: a configuration file of mmsegmentation, as :func:`load_config` reads it. None: the
            configuration in the checkpoint, where there is one.
        arguments: of :func:`import_checkpoint`.

    Raises:
        OSError, ValueError: as :func:`load_checkpoint` and :func:`import_checkpoint`, and where
            both are one file; then nothing is written.
    """
    if os.path.exists(converted) and os.path.samefile(path, converted):
        raise ValueError(f"{os.fspath(converted)!r} is the checkpoint itself: name another file")
    loaded = read(path)
    told = _config(loaded) if config is None else load_config(config)
    imported = import_checkpoint(_state_dict(loaded, path, ema), config=told, **arguments)
    imported.save(converted)
    return imported


def load_model(path: str | os.PathLike) -> SegmentationNetwork:
    """The network in a file that :func:`convert_checkpoint` wrote, in evaluation mode.

    Raises:
        OSError: no such file.
        ValueError: a file of another kind.
    """
    saved = read(path)
    if (
        not isinstance(saved, Mapping)
        or not saved.keys() >= set(_SAVED)
        or not isinstance(saved["arguments"], Mapping)
    ):
        raise ValueError(
            f"{os.fspath(path)!r} is no saved network; checkpoints of other code: ctxops convert"
        )
    network = create_model(saved["model"], **saved["arguments"])
    network.load_state_dict(saved["state_dict"])
    return network.eval()


def load_weights(
    network: SegmentationNetwork,
    state_dict: Mapping[str, Tensor],
    *,
    strict: bool = True,
    rename: Mapping[str, str] | None = None,
) -> str:
    """Loads the weights of a network of this package into another one.

    Args:
        network: to load into.
        state_dict: of the other one: ``load_checkpoint(path)``.
        strict: both have the same names and shapes, or it raises. False: loads what has.
        rename: modules that the other one has under another name: ``{theirs: ours}``, such as
            ``{"decoder": "decoder.context"}``, the context of ``pspnet`` in ``gff``.

    Returns:
        What is missing, unexpected or of another shape, as text; "" where all was loaded.

    Raises:
        ValueError: weights that do not fit; nothing that fits; a name to be replaced that no weight
            has. Then nothing is loaded.
    """
    expected, renamed = network.state_dict(), dict(state_dict)
    for theirs, ours in (rename or {}).items():
        moved = [name for name in state_dict if name.startswith(f"{theirs}.")]
        if not moved:
            raise ValueError(f"no weight of the checkpoint is in a module {theirs!r}")
        for name in moved:
            renamed[ours + name.removeprefix(theirs)] = renamed.pop(name)
    missing = [name for name in expected if name not in renamed]
    unexpected = [name for name in renamed if name not in expected]
    common = {name: x for name, x in renamed.items() if name in expected}
    fitting = {name: x for name, x in common.items() if x.shape == expected[name].shape}
    shapes = [
        f"{name} {tuple(x.shape)} instead of {tuple(expected[name].shape)}"
        for name, x in common.items()
        if name not in fitting
    ]
    left = _differences(missing, unexpected, shapes)
    if (strict and left) or not fitting:
        raise ValueError(f"the weights do not fit the network: {left}")
    network.load_state_dict(expected | fitting)
    return left


def load_backbone(encoder: Encoder, state_dict: Mapping[str, Tensor]) -> list[str]:
    """Loads a classifier's weights, by the names of timm, torchvision or mmsegmentation.

    Args:
        encoder: of a network: ``create_model("ann", "resnet50").encoder``.
        state_dict: of the classifier, or of a network whose backbone it is:
            ``load_checkpoint(path)``.

    Returns:
        The names that were not used, all of them outside the backbone's part that makes the
        encoder's maps: those of the classifier.

    Raises:
        ValueError: a checkpoint of another backbone; then nothing is loaded.
    """
    expected = encoder.body.state_dict()
    tensors = _strip_prefixes(state_dict)
    present = [each for each in _BACKBONES if any(name.startswith(each) for name in tensors)]
    prefix = present[-1] if present else ""
    theirs = {n.removeprefix(prefix): x for n, x in tensors.items() if n.startswith(prefix)}
    others = [name for name in tensors if not name.startswith(prefix)]
    names = {ours: _backbone_name(ours, theirs) for ours in expected}
    missing = [
        ours
        for ours, name in names.items()
        if name is None and not ours.endswith(".num_batches_tracked")
    ]
    loaded = {ours: theirs[name] for ours, name in names.items() if name is not None}
    taken = set(names.values()) - {None}
    unused = [name for name in theirs if name not in taken]
    parts = {name.split(".")[0] for name in taken}
    unexpected = [name for name in unused if name.split(".")[0] in parts]
    shapes = [
        f"{ours} {tuple(tensor.shape)} instead of {tuple(expected[ours].shape)}"
        for ours, tensor in loaded.items()
        if tensor.shape != expected[ours].shape
    ]
    if missing or unexpected or shapes:
        raise ValueError(
            f"the checkpoint does not fit backbone {encoder.name!r}: "
            + _differences(missing, unexpected, shapes)
        )
    encoder.body.load_state_dict(expected | loaded)
    return [*unused, *others]


_NUMBERED_STEM = {ours: theirs for theirs, ours in STEM.items()}


def _backbone_name(ours: str, theirs: Mapping[str, Tensor]) -> str | None:
    """The checkpoint's name for a tensor of timm's feature extractor, if there is one."""
    module, _, leaf = ours.rpartition(".")
    candidates = (
        ours,
        # timm flattens one level, "stages.0" to "stages_0", or wraps the model.
        re.sub(r"^([a-z]+)_(\d+)\.", r"\1.\2.", ours),
        ours.removeprefix("model."),
        f"{_NUMBERED_STEM.get(module, module)}.{leaf}",
    )
    return next((name for name in candidates if name in theirs), None)


def _choose(state_dict: Mapping[str, Tensor], source: str | None, model: str | None) -> Importer:
    importers = IMPORTERS
    if source is not None:
        check_known("source", source, {importer.source for importer in importers})
        importers = [importer for importer in importers if importer.source == source]
    if model is not None:
        check_known("imported model", model, {importer.model for importer in importers})
        importers = [importer for importer in importers if importer.model == model]
    marked = [each for each in importers if _has(state_dict, *each.markers)]
    if marked:
        return marked[0]
    for refused in REFUSED:
        if model is None and _has(state_dict, *refused.markers):
            raise ValueError(
                f"the checkpoint is of {refused.source}'s {refused.model}, which is not imported"
            )
    # Of one network from several sources, the names of the backbone, which come first, tell.
    likely = [each for each in importers if _has(state_dict, each.markers[0])]
    for found in (importers, likely):
        if len(found) == 1:
            return found[0]
    known = ", ".join(dict.fromkeys(f"{each.source} {each.model}" for each in importers))
    raise ValueError(
        f"the checkpoint is of no known architecture ({known}): it has {spell(list(state_dict))}"
    )


def _has(state_dict: Mapping[str, Tensor], *markers: str) -> bool:
    return all(any(name.startswith(marker) for name in state_dict) for marker in markers)


def _rename(
    state_dict: Mapping[str, Tensor], importer: Importer
) -> tuple[dict[str, Tensor], list[str]]:
    """The tensors by our names, and the names that are none of the importer's."""
    renamed, unexpected = {}, []
    for theirs, ours in _renamings(state_dict, importer):
        if ours is None or ours in renamed:  # a second name for the same
            unexpected.append(theirs)
        else:
            renamed[ours] = state_dict[theirs]
    return renamed, unexpected


def _renamings(names: Iterable[str], importer: Importer) -> Iterable[tuple[str, str | None]]:
    patterns = [(re.compile(_pattern(theirs)), ours) for theirs, ours in importer.modules.items()]
    for name in names:
        for pattern, ours in patterns:
            match = pattern.fullmatch(name)
            if match:
                yield name, ours.format(*match.groups()[1:]) + name[match.end("module") :]
                break
        else:
            yield name, None


def _pattern(template: str) -> str:
    """What matches a module's tensors: ``{}`` stands for a number."""
    return "(?P<module>" + re.escape(template).replace(r"\{\}", r"(\d+)") + ")" + _LEAVES


def _fits(tensor: Tensor, expected: Tensor) -> bool:
    """Equal shapes; a single number may have any."""
    return tensor.shape == expected.shape or tensor.numel() == expected.numel() == 1


def _strip_prefixes(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors by their names without what training puts before all of them."""
    tensors = _tensors(state_dict)
    while tensors:
        common = (p for p in _PREFIXES if all(name.startswith(p) for name in tensors))
        prefix = next(common, None)
        if prefix is None:
            break
        tensors = {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}
    return tensors


def _tensors(state_dict: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: x for name, x in state_dict.items() if isinstance(x, Tensor)}


def _misfit(
    importer: Importer,
    missing: list[str],
    unexpected: list[str],
    shapes: Sequence[str] = (),
) -> ValueError:
    return ValueError(
        f"the checkpoint does not fit {importer.source}'s {importer.model}: "
        + _differences(missing, unexpected, shapes)
    )


def _differences(missing: list[str], unexpected: list[str], shapes: Sequence[str]) -> str:
    parts = {"missing": missing, "unexpected": unexpected, "shapes": shapes}
    return "; ".join(f"{what} {spell(names)}" for what, names in parts.items() if names)


def spell(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    more = f" and {len(names) - _SPELLED} more" if len(names) > _SPELLED else ""
    return ", ".join(names[:_SPELLED]) + more
