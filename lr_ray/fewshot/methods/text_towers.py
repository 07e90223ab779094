"""Methods that learn prompts for a text tower, which a backbone of images alone does not have: a row that says so."""

_REASON = (
    "does not apply: it learns the words of a text encoder such as CLIP's, and a Vision Transformer alone has none; to compare "
    "with it, run it on CLIP with the episodes that `lr-ray eval` stores"
)
UNAVAILABLE = dict.fromkeys(("coop", "cocoop", "promptsrc", "tpt"), _REASON)
