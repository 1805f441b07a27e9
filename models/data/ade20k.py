# SPDX-License-Identifier: Apache-2.0
"""ADE20K (Zhou et al., CVPR 2017), the 150 classes of the scene parsing challenge."""

from ctxops.models.data.spec import IGNORE, Spec, Split

_CLASSES = (
    "wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, "
    "person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, "
    "shelf, house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, "
    "bathtub, railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, "
    "sink, skyscraper, fireplace, refrigerator, grandstand, path, stairs, runway, case, "
    "pool table, pillow, screen door, stairway, river, bridge, bookcase, blind, coffee table, "
    "toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island, computer, "
    "swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, "
    "chandelier, awning, streetlight, booth, television receiver, airplane, dirt track, apparel, "
    "pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage, van, ship, "
    "fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel, basket, "
    "waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name, "
    "microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, "
    "sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, "
    "bulletin board, shower, radiator, glass, clock, flag"
)

ADE20K = Spec(
    "ade20k",
    tuple(_CLASSES.split(", ")),
    {
        split: Split(f"images/{folder}/*.jpg", f"annotations/{folder}/*.png")
        for split, folder in (("train", "training"), ("val", "validation"))
    },
    # 0 is what belongs to none of the classes.
    {0: IGNORE} | {k + 1: k for k in range(150)},
    source="ADEChallengeData2016.zip of the scene parsing challenge",
)
