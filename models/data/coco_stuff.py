# SPDX-License-Identifier: Apache-2.0
"""COCO-Stuff (Caesar et al., CVPR 2018): 80 classes of things and 91 of stuff.

Both versions are read as they are published. The trees of mmsegmentation's converters still have
these files.
"""

from ctxops.models.data.spec import IGNORE, Spec, Split

# In the order of their numbers, from 1 on: 91 things, then 91 kinds of stuff.
_CLASSES = (
    "person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, "
    "fire hydrant, -, stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, "
    "elephant, bear, zebra, giraffe, -, backpack, umbrella, -, -, handbag, tie, suitcase, frisbee, "
    "skis, snowboard, sports ball, kite, baseball bat, baseball glove, skateboard, surfboard, "
    "tennis racket, bottle, -, wine glass, cup, fork, knife, spoon, bowl, banana, apple, sandwich, "
    "orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch, potted plant, bed, -, "
    "dining table, -, -, toilet, -, tv, laptop, mouse, remote, keyboard, cell phone, microwave, "
    "oven, toaster, sink, refrigerator, -, book, clock, vase, scissors, teddy bear, hair drier, "
    "toothbrush, -, "
    "banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, "
    "ceiling-other, ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, "
    "dirt, door-stuff, fence, floor-marble, floor-other, floor-stone, floor-tile, floor-wood, "
    "flower, fog, food-other, fruit, furniture-other, grass, gravel, ground-other, hill, house, "
    "leaves, light, mat, metal, mirror-stuff, moss, mountain, mud, napkin, net, paper, pavement, "
    "pillow, plant-other, plastic, platform, playingfield, railing, railroad, river, road, rock, "
    "roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow, solid-other, stairs, stone, "
    "straw, structural-other, table, tent, textile-other, towel, tree, vegetable, wall-brick, "
    "wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other, "
    "waterdrops, window-blind, window-other, wood"
)
# A dash is a number of COCO that no pixel has.
_NUMBERED = [(n, name) for n, name in enumerate(_CLASSES.split(", "), 1) if name != "-"]
_NUMBERS, _NAMES = zip(*_NUMBERED, strict=True)

COCO_STUFF_164K = Spec(
    "coco_stuff164k",
    _NAMES,
    {
        split: Split(f"images/{split}2017/*.jpg", f"annotations/{split}2017/*.png")
        for split in ("train", "val")
    },
    {number - 1: k for k, number in enumerate(_NUMBERS)},
    source="train2017.zip and val2017.zip of COCO, and stuffthingmaps_trainval2017.zip of "
    "COCO-Stuff",
)
COCO_STUFF_10K = Spec(
    "coco_stuff10k",
    _NAMES,
    {
        split: Split("images/*.jpg", "annotations/*.mat", f"imageLists/{split}.txt")
        for split in ("train", "test")
    },
    {0: IGNORE} | {number: k for k, number in enumerate(_NUMBERS)},
    variable="S",
    source="cocostuff-10k-v1.1.zip",
)
