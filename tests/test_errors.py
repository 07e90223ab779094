import pickle

import pytest

from lr_ray import errors

CLASSES = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, Exception)]


@pytest.mark.parametrize("cls", CLASSES)
def test_survives_pickling(cls: type[Exception]):
    copy = pickle.loads(pickle.dumps(cls("adapters x: no such folder")))
    assert type(copy) is cls
    assert str(copy) == "adapters x: no such folder"


@pytest.mark.parametrize("cls", CLASSES)
def test_is_one_line(cls: type[Exception]):
    assert str(cls("  first\n    second\r\n\tthird  ")) == "first second third"


@pytest.mark.parametrize("cls", CLASSES)
def test_is_an_lr_ray_error(cls: type[Exception]):
    assert issubclass(cls, errors.LrRayError)
    assert not issubclass(cls, OSError | ValueError)


def test_a_misspelt_name_is_answered_with_those_that_are_close():
    assert errors.did_you_mean("loras_avg", ["nn", "loras-avg", "recycle"]) == "did you mean loras-avg? "
    assert errors.did_you_mean("vit", ["vit_b", "vit_s", "deit"], most=2) == "did you mean vit_s or vit_b? "
    assert errors.did_you_mean("unicorn", ["nn"]) == ""


def test_the_docstring_draws_the_whole_tree():
    tree = (errors.__doc__ or "").partition("::")[2].split("\n\n")[1]
    drawn = [line.replace("├──", "").replace("└──", "").split()[0] for line in tree.splitlines()]
    assert drawn == [cls.__name__ for cls in CLASSES]
