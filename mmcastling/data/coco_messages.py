"""What the COCO check says, by what is wrong; the check fills in the braces."""

HOW_TO_GET_COCO = (
    "Get COCO from https://cocodataset.org or with mmdet's "
    "`tools/misc/download_dataset.py --dataset-name coco2017 --unzip`."
)

# Of the file as a whole; the sentence begins with its name.
FILE = {
    "missing": "does not exist; expected a COCO annotation file. Check data_root and "
    f"ann_file in the config. {HOW_TO_GET_COCO}",
    "folder": "is a folder; expected a COCO annotation file such as "
    "annotations/instances_val2017.json. Point ann_file at the file.",
    "unreadable": "cannot be read ({error}); expected a readable JSON file. Check its "
    "permissions.",
    "empty": "is empty ({size} bytes); expected JSON. Download or export it again. "
    f"{HOW_TO_GET_COCO}",
    "archive": "is a compressed archive; expected plain JSON. Unpack it first.",
    "binary": "is not text at byte {error.start}; expected JSON in UTF-8. Check that "
    "ann_file names the annotations and not an image or an archive.",
    "syntax": "is not valid JSON at line {error.lineno}, column {error.colno} "
    "(character {error.pos} of {size}): {error.msg}, near {near!r}; expected a JSON "
    "object. {remedy}.",
    "top level": "holds a {kind} at the top level; expected an object with images, "
    "annotations and categories. {hint}Point ann_file at the ground truth.",
    "no key": "has no key {key!r} (it has {keys}); expected images, annotations and "
    "categories. Take an instances_* file; image_info_* are without ground truth.",
    "no list": "holds a {kind} under {key!r}; expected a list. Export it in COCO's "
    "instance format.",
    "no images": "lists no images; expected at least one. Check the split or the "
    "filter it was exported with.",
}

# Of classes and image files.
SETS = {
    "unknown": "{count} of {total} category names are not in the config's classes: "
    "{names}; the classes are {classes}. Set metainfo=dict(classes=...) of the dataset "
    "to the names of this file, and num_classes of the heads to their number.",
    "uncovered": "{count} of {total} classes have no category: {names}; the file's "
    "categories are {classes}. Correct the spelling, or remove the classes from the "
    "config.",
    "image folder": "the image folder {folder} does not exist or is not a folder; "
    "expected the {total} images of this file in it. Check data_root and data_prefix "
    f"in the config. {HOW_TO_GET_COCO}",
    "image files": "{count} of {total} images are not in {folder}, first {names}; the "
    "folder has {entries} entries. Check data_prefix in the config, or complete the "
    f"download. {HOW_TO_GET_COCO}",
}

# Of one entry; the sentence begins with its place, such as "annotations[3] (id 7)".
ENTRY = {
    "no object": "is a {kind}; expected an object. Remove it.",
    "no keys": "(id {id!r}) has no {missing}; expected the keys {keys}. {hint}.",
    "id": "has id {id!r}; expected an integer. Renumber the entries.",
    "id twice": "repeats {kind} id {id!r}; expected each once. Remove one, or renumber "
    "it together with the annotations that mean it.",
    "name twice": "repeats the name {name!r}; expected each class once. Merge the two "
    "and renumber their annotations.",
    "size": "(id {id}, {file_name}) has width {width!r} and height {height!r}; "
    "expected positive numbers. Write the size of the image file.",
    "ids": "has id {id!r}, image_id {image_id!r}, category_id {category_id!r}; "
    "expected integers. Export the file again.",
    "annotation twice": "repeats an annotation id; expected each once, since the later "
    "one replaces the earlier. Renumber the annotations.",
    "image": "points to image_id {id!r}, which is not in images; expected one of "
    "{total} ids such as {ids} (text and number differ). Add the image or remove the "
    "annotation.",
    "category": "has category_id {id!r}, which is not in categories; expected one of "
    "{ids}. Add the category or correct the id.",
    "crowd": "has iscrowd {crowd!r}; expected 0 or 1. Write 1 for a region that the "
    "evaluation should pass over, else 0.",
    "area": "has area {area!r}; expected a number of pixels, 0 or more. Write the area "
    "of the mask, or width x height of the box.",
    "box": "has bbox {box!r}; expected four finite numbers [x, y, width, height] in "
    "pixels. Correct or remove the annotation.",
    "negative box": "has bbox {box!r} with a negative side; expected [x, y, width, "
    "height]. Order the corners before subtracting them.",
    "box outside": "has bbox {box!r}, which leaves its image of {size} (width, height) "
    "by more than {tolerance:g} px; expected [x, y, width, height] in pixels. Clip the "
    "box to the image{hint}.",
    "mask": "has a {kind} as segmentation; expected a list of polygons or an RLE. "
    "Export the masks again.",
    "bare polygon": "has segmentation {shown}; expected a list of polygons, each a "
    "list [x0, y0, x1, y1, ...]. Wrap a single polygon in one more pair of brackets.",
    "polygon length": "has {length} numbers in polygon {number}, {shown}; expected an "
    "even number and at least 6, for three corners. Remove the polygon, or write the "
    "box as four corners.",
    "polygon values": "has values in polygon {number} that are not finite numbers: "
    "{shown}; expected pixels. Correct or remove the polygon.",
    "rle keys": "has an RLE without {missing} (its keys are {keys}); expected size "
    "[height, width] and counts. Encode the mask again.",
    "rle size": "has an RLE of size {found!r}; expected {expected}, height and width "
    "of its image. Encode the mask at the size of the image.",
    "rle counts": "has RLE counts {shown!r}; expected a string or a list of run "
    "lengths. Encode the mask again.",
    "rle sum": "has RLE counts that sum to {found}; expected {expected}, one for each "
    "pixel of the image. Encode the mask again.",
}
