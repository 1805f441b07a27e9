# SPDX-License-Identifier: Apache-2.0
"""Deliberate faults of training, evaluation and data."""

from faults.fault import faults_in

TRAINING = [
    *faults_in(
        "models/data/scenes.py",
        "tests/models/data/test_scenes.py",
        (
            "scenes-colour-tells",
            "the colour of the ground tells the place without the landmark",
            "canvas.colour(70, 150), _GROUND, True)",
            "canvas.colour(70, 150) - 9 * canvas.places[0], _GROUND, True)",
        ),
        (
            "scenes-one-place",
            "two zones are one place",
            "self.places[self.zone[x]]",
            "self.places[0]",
        ),
        (
            "right-places-other-pairs",
            "a house that is taken for a tree counts as one in the wrong place",
            " & (truth // 2 == predicted // 2)",
            "",
        ),
    ),
    *faults_in(
        "models/data/order.py",
        "tests/models/data/test_order.py",
        (
            "order-first-epoch-again",
            "every epoch sees the samples of the first one",
            "range(self.epoch * self.steps, (self.epoch + 1) * self.steps)",
            "range(self.steps)",
        ),
        (
            "order-processes",
            "all processes see the samples of the first one",
            "step * self.batch_size + self.rank * self.share",
            "step * self.batch_size",
        ),
    ),
    *faults_in(
        "models/data/files.py",
        "tests/models/data/test_files.py",
        (
            "files-bad-reported-always",
            "a pair that is passed over is reported in every epoch",
            "if not self._bad[index]:",
            "if True:",
        ),
        (
            "files-tiff-turned",
            "a TIFF that is to be turned is segmented as it is stored",
            'turned = "Orientation" in page.tags and page.tags["Orientation"].value != 1',
            "turned = False",
        ),
        (
            "files-tiff-lower-bits",
            "of a TIFF of 16 bits the lower 8 are used",
            "part >> 8 * (part.itemsize - 1)",
            "part",
        ),
    ),
    *faults_in(
        "models/training/datamodule.py",
        "tests/models/training/test_fit.py -k continues_bitwise",
        (
            "resumed-workers-first-epoch",
            "a resumed run with workers begins with the samples of the first epoch",
            "sampler.set_epoch(self._epoch)",
            "",
        ),
    ),
    *faults_in(
        "models/data/augment.py",
        "tests/models/data/test_augment.py",
        (
            "augment-first-instead-of-next",
            "one sample takes the place of all that are passed over",
            "(*range(first, len(self)), *range(first))",
            "(first, *range(len(self)))",
        ),
        (
            "augment-left-stays-left",
            "in a mirror image a left arm stays a left arm",
            "for left, right in self.mirrored:",
            "for left, right in ():",
        ),
        (
            "augment-labels-not-flipped",
            "a mirror image keeps its labels",
            "image, labels = image.flip(-1), labels.flip(-1)",
            "image, labels = image.flip(-1), labels",
        ),
        (
            "augment-padding-is-a-class",
            "padding counts as class 0",
            "transforms.pad(labels[None], padding, fill=IGNORE)[0]",
            "transforms.pad(labels[None], padding)[0]",
        ),
    ),
    *faults_in(
        "models/data/spec.py",
        "tests/models/data/test_files.py",
        (
            "spec-unknown-is-ignored",
            "numbers that the data set does not know are ignored without a word",
            "unknown = classes == _UNKNOWN",
            "unknown = classes == 1 << 14",
        ),
        (
            "spec-label-without-image",
            "a label without an image is passed over in silence",
            "for path in found - known",
            "for path in found & known",
        ),
    ),
    *faults_in(
        "models/data/coco_stuff.py",
        "tests/models/data/test_files.py",
        (
            "coco-stuff-numbers",
            "the numbers that no pixel has are not left out",
            "{number - 1: k for k, number in enumerate(_NUMBERS)}",
            "{k: k for k, number in enumerate(_NUMBERS)}",
        ),
    ),
    *faults_in(
        "models/data/pascal_context.py",
        "tests/models/data/test_files.py",
        (
            "pascal-context-59-background",
            "the background is the first of the 59 classes",
            "{0: IGNORE} | {k + 1: k for k in range(59)}",
            "{k: k for k in range(59)} | {59: IGNORE}",
        ),
    ),
    *faults_in(
        "models/training/losses.py",
        "tests/models/training/test_losses.py",
        (
            "loss-mean-over-ignored",
            "ignored pixels count in the mean",
            "return losses / (labels != IGNORE).sum().clamp_min(1)",
            "return losses / labels.numel()",
        ),
        (
            "ohem-share-of-all",
            "OHEM keeps a share of all pixels, ignored ones included",
            "rank < (keep * labelled.sum()).ceil()",
            "rank < keep * labelled.numel()",
        ),
    ),
    *faults_in(
        "models/training/metrics.py",
        "tests/models/training/test_metrics.py",
        (
            "absent-class-counts",
            "a class that no label has counts as 0 where it was predicted",
            "present = labelled > 0",
            "present = union > 0",
        ),
    ),
    *faults_in(
        "models/training/boundaries.py",
        "tests/models/training/test_boundaries.py",
        (
            "dilation-square",
            "the neighbourhood of a boundary is a square",
            "math.isqrt(radius**2 - dy**2)",
            "radius",
        ),
        (
            "boundary-f-precision-alone",
            "the F-score of a boundary knows no recall",
            "precision, recall = hits / count.clamp_min(1)",
            "precision = recall = (hits / count.clamp_min(1))[0]",
        ),
        (
            "region-one-sided",
            "a pixel is near a boundary on the side of the smaller class alone",
            "(largest != own) | (-negative != own)",
            "largest != own",
        ),
    ),
    *faults_in(
        "models/training/stages.py",
        "tests/models/training/test_stages.py",
        (
            "stage-from-nothing",
            "a stage does not start from the weights of the one before it",
            'yield [*told, "--model.init_from", str(weights)]',
            "yield told",
        ),
    ),
    *faults_in(
        "models/convert.py",
        "tests/models/test_load_weights.py",
        (
            "weights-in-part-unasked",
            "weights that do not fit are left out where all were asked for",
            "if (strict and left) or not fitting:",
            "if not fitting:",
        ),
    ),
    *faults_in(
        "models/training/optimization.py",
        "tests/models/training/test_optimization.py",
        (
            "norms-decay",
            "decay_norms=False is ignored",
            '{"params": flat, "weight_decay": 0.0},',
            '{"params": flat},',
        ),
    ),
    *faults_in(
        "models/pictures/attention.py",
        "tests/models/test_pictures.py -k criss_cross",
        (
            "look-first-round-alone",
            "the picture after two recurrences is that after the last one alone",
            "for query, key in rounds:",
            "for query, key in rounds[-1:]:",
        ),
    ),
    *faults_in(
        "models/pictures/gates.py",
        "tests/models/test_pictures.py -k gates",
        (
            "look-gates-stay-open",
            "closing a gate closes the first one",
            'options | {"closed": (level,)}',
            'options | {"closed": (0,)}',
        ),
    ),
    *faults_in(
        "models/pictures/inside.py",
        "tests/models/test_pictures.py -k receptive",
        (
            "look-field-of-all-classes",
            "the receptive field is that of the sum of all scores",
            "image)[0, :, at[0], at[1]].max()",
            "image)[0, :, at[0], at[1]].sum()",
        ),
    ),
    *faults_in(
        "models/inference.py",
        "tests/models/test_inference.py",
        (
            "tiles-without-halo",
            "the encoder sees nothing around a tile below and on the right",
            "image[:, :, top : bottom + halo, left : right + halo]",
            "image[:, :, top:bottom, left:right]",
        ),
        (
            "flip-stays-mirrored",
            "scores of the mirror image are not mirrored back",
            "passes.append(_mirrored(rows) if mirrored else rows)",
            "passes.append(rows)",
        ),
        (
            "sliding-rows-kept",
            "rows of the sum over windows are counted twice",
            "unfinished = total[:, :, finished:]",
            "unfinished = total",
        ),
        (
            "decoder-bands-halo",
            "the decoder sees nothing around a band",
            "return map_in_bands(predict, maps, rows, around, multiples)",
            "return map_in_bands(predict, maps, rows, 0, multiples)",
        ),
    ),
    *faults_in(
        "ctxops/nn/resize.py",
        "tests/models/test_inference.py tests/nn/test_bands.py",
        (
            "bands-corners",
            "align_corners=True is ignored along the height",
            "    if align_corners:\n        position = row",
            "    if not align_corners:\n        position = row",
        ),
    ),
    *faults_in(
        "ctxops/nn/bands.py",
        "tests/nn/test_bands.py",
        (
            "bands-count-halos",
            "sums over positions count the rows of the halo too",
            "part = summand(*map(self.core, maps))",
            "part = summand(*maps)",
        ),
        (
            "bands-trust-derived",
            "a forward that overrides the known one is taken in bands",
            'if "forward" in vars(kind) or "predict" in vars(kind):',
            "if kind is nn.Module:",
        ),
        (
            "bands-place",
            "a grid of the whole image is resized as if each band were the first",
            "rows = range(place.first, place.first + height)",
            "rows = range(height)",
        ),
    ),
]
