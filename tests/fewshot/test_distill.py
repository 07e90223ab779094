import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch import Tensor, nn

from lr_ray.fewshot.distill import ScheduleConfig, Student, TrainConfig, batch_loss, distillation_loss, view_episode
from lr_ray.fewshot.episodes import Episode, EpisodeSampler, EpisodeShape, ImagePool
from lr_ray.vit.backbone import Backbone
from lr_ray.vit.lora import LoRAConfig, attach_lora
from tests.fewshot.pools import classes_of

NO_AUGMENTATION = {"flip": False}


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        (0, 1e-5),
        (12, 1e-5 + 0.48 * 9.9e-4),
        (25, 1e-3),
        (50, 1e-5 + 0.75 * 9.9e-4),  # a third of the cosine: (1 + cos 60°) / 2
        (62, 1e-5 + 0.5 * (1 + math.cos(math.pi * 37 / 75)) * 9.9e-4),
        (75, 1e-5 + 0.25 * 9.9e-4),
        (99, 1e-5 + 0.5 * (1 + math.cos(math.pi * 74 / 75)) * 9.9e-4),
        (100, 1e-5),
        (125, 1e-3),
        (350, 1e-5 + 0.75 * 9.9e-4),
    ],
)
def test_the_papers_schedule(step: int, expected: float):
    assert ScheduleConfig().at(step, 1000) == pytest.approx(expected, rel=1e-9)


def test_the_middle_of_the_cosine_is_the_middle_of_the_rates():
    schedule = ScheduleConfig(lowest=1.0, highest=3.0, warmup_steps=10, cosine_steps=20)
    assert [schedule.at(step, 40) for step in (0, 5, 10, 20, 30)] == pytest.approx([1, 2, 3, 2, 1])


def test_no_warm_up_starts_at_the_top():
    schedule = ScheduleConfig(lowest=1.0, highest=3.0, warmup_steps=0, cosine_steps=2)
    assert [schedule.at(step, 40) for step in range(4)] == pytest.approx([3, 2, 3, 2])


def test_one_cycle_lasts_to_the_end():
    schedule = ScheduleConfig(lowest=1.0, highest=3.0, warmup_steps=10, cosine_steps=None)
    assert [schedule.at(step, 30) for step in (0, 10, 20, 30 - 1)] == pytest.approx([1, 3, 2, 2 + math.cos(math.pi * 19 / 20)])
    assert [schedule.at(step, 1010) for step in (5, 510)] == pytest.approx([2, 2])


def test_kl_of_two_known_distributions():
    student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.9, 0.1]]).log()
    expected = 0.9 * math.log(0.9 / 0.5) + 0.1 * math.log(0.1 / 0.5)  # KL(teacher ‖ student), not the reverse
    assert distillation_loss(student, teacher, 1.0).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 4.0])
def test_kl_against_the_formula(temperature: float):
    generator = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 7, 5, generator=generator, dtype=torch.float64)
    p, q = (teacher / temperature).softmax(dim=1), (student / temperature).softmax(dim=1)
    expected = temperature**2 * (p * (p / q).log()).sum(dim=1).mean()
    torch.testing.assert_close(distillation_loss(student, teacher, temperature), expected)


def test_kl_is_zero_for_equal_logits_and_blind_to_a_shift():
    logits = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    assert distillation_loss(logits, logits, 2.0).item() == 0
    assert distillation_loss(logits + 3, logits, 2.0).item() == pytest.approx(0, abs=1e-6)


def test_temperature_squared_keeps_the_size_of_the_gradient():
    """At a high temperature T² KL tends to the variance of the difference over two, whatever T is."""
    student, teacher = torch.tensor([[1.0, -1.0]], dtype=torch.float64), torch.zeros(1, 2, dtype=torch.float64)
    for temperature in (100.0, 1000.0):
        assert distillation_loss(student, teacher, temperature).item() == pytest.approx(0.5, rel=1e-3)


class FirstPixel(nn.Module):
    """A student whose features are the colour of the first pixel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[Tensor, Tensor | None]] = []

    def forward(self, pixels: Tensor, keep_indices: Tensor | None) -> Tensor:
        self.seen.append((pixels, keep_indices))
        return pixels[:, :, 0, 0]


def colours(*values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.uint8)[:, :, None, None].expand(-1, -1, 4, 4)


def toy_episode(**changes: Any) -> Episode:
    """2-way 1-shot, features (after division by 255) at (0, 0, 0) and (1, 0, 0), two queries between them."""
    return Episode(
        **{
            "n_way": 2,
            "support_images": colours([0, 0, 0], [255, 0, 0]),
            "query_images": colours([51, 0, 0], [102, 0, 0]),  # 0.2 and 0.4
            "query_labels": torch.tensor([0, 1]),
            "keep_indices": None,
            "teacher_logits": None,
            "flipped_logits": None,
            **changes,
        }
    )


def loss_of(student: nn.Module, episode: Episode, **changes: Any) -> tuple[Tensor, Tensor]:
    config = TrainConfig(**{"augmentation": NO_AUGMENTATION, "precision": "fp32", **changes})
    batch = view_episode(episode, config, grid_size=(4, 4), generator=torch.Generator().manual_seed(0))
    return batch_loss(student, batch, config)


@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_without_a_teacher_the_loss_is_cross_entropy(scale: float):
    loss, accuracy = loss_of(FirstPixel(), toy_episode(), logit_scale=scale)
    # logits -0.2, -0.8 and -0.4, -0.6: the first query is right, the second wrong
    expected = (math.log(1 + math.exp(-0.6 * scale)) + math.log(1 + math.exp(0.2 * scale))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert accuracy.item() == 0.5


def test_the_distance_is_the_configs():
    loss, _ = loss_of(FirstPixel(), toy_episode(), distance="squared")  # -0.04, -0.64 and -0.16, -0.36
    expected = (math.log(1 + math.exp(-0.6)) + math.log(1 + math.exp(0.2))) / 2
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    other, _ = loss_of(FirstPixel(), toy_episode(query_images=colours([0, 102, 0], [0, 0, 0])), distance="squared")
    assert other.item() == pytest.approx((math.log(1 + math.exp(-1)) + math.log(1 + math.exp(1))) / 2, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_with_a_teacher_the_loss_is_kl_to_it(temperature: float):
    teacher = torch.tensor([[2.0, 0.0], [0.0, 1.0]], dtype=torch.float16)
    loss, accuracy = loss_of(FirstPixel(), toy_episode(teacher_logits=teacher), temperature=temperature)
    student = torch.tensor([[-0.2, -0.8], [-0.4, -0.6]])
    assert loss.item() == pytest.approx(distillation_loss(student, teacher.float(), temperature).item(), rel=1e-5)
    assert accuracy.item() == 0.5


def test_a_student_that_agrees_with_its_teacher_has_no_loss():
    teacher = torch.tensor([[-0.2, -0.8], [-0.4, -0.6]])
    loss, _ = loss_of(FirstPixel(), toy_episode(teacher_logits=teacher))
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_support_and_query_pass_in_one_batch_with_the_patches_to_keep():
    student, keep = FirstPixel(), torch.arange(8).view(4, 2)
    loss_of(student, toy_episode(keep_indices=keep))
    ((pixels, kept),) = student.seen
    torch.testing.assert_close(pixels[:, 0, 0, 0], torch.tensor([0, 1, 0.2, 0.4]))
    assert torch.equal(kept, keep)


def test_the_augmentation_is_the_configs():
    student = FirstPixel()
    images = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    images[:, :, :, 3] = 255  # one side bright: mirroring shows
    loss_of(student, toy_episode(support_images=images, query_images=images), augmentation={"flip": True})
    assert {pixels[0, 0, 0].item() for pixels in student.seen[0][0]} == {0.0, 1.0}


def test_a_mirrored_query_has_the_teachers_logits_of_its_mirror_image():
    images = torch.zeros(8, 3, 4, 4, dtype=torch.uint8)
    images[:, :, :, 3] = 255
    episode = toy_episode(
        support_images=images[:2],
        query_images=images,
        query_labels=torch.arange(2).repeat_interleave(4),
        teacher_logits=torch.zeros(8, 2),
        flipped_logits=torch.ones(8, 2),
    )
    config = TrainConfig(augmentation={"flip": True})
    batch = view_episode(episode, config, grid_size=(4, 4), generator=torch.Generator().manual_seed(0))
    mirrored = batch.pixels[2:, 0, 0, 0] == 1
    assert 0 < mirrored.sum() < 8
    assert torch.equal(batch.teacher_logits, mirrored.float()[:, None].expand(-1, 2))


@pytest.mark.parametrize("adapter_share", [0.0, 1.0])
def test_the_loss_of_a_fresh_student_is_the_backbones(
    make_backbone: Callable[[], Backbone], colour_pool: ImagePool, adapter_share: float
):
    backbone = make_backbone()
    attach_lora(backbone.model, LoRAConfig(), generator=torch.Generator().manual_seed(0))
    shape = EpisodeShape(n_way=3, n_shot=2, n_query=4)
    episode = EpisodeSampler(classes_of(colour_pool), shape, seed=0, adapter_share=adapter_share, keep_ratio=1).draw(0)
    loss, accuracy = loss_of(Student(backbone, "fp32"), episode)
    model = make_backbone().model
    support, queries = (model((images.float() / 255 - 0.5) / 0.5) for images in (episode.support_images, episode.query_images))
    centres = torch.stack([support[2 * c : 2 * c + 2].mean(dim=0) for c in range(3)])
    logits = -(queries[:, None] - centres).norm(dim=-1)
    labels = torch.arange(3).repeat_interleave(4)
    if adapter_share:
        expected = F.kl_div(logits.log_softmax(1), episode.teacher_logits.softmax(1), reduction="batchmean")
    else:
        expected = F.cross_entropy(logits, labels)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=1e-5)
    assert accuracy.item() == pytest.approx((logits.argmax(1) == labels).float().mean().item())


@pytest.mark.parametrize("adapter_share", [0.0, 1.0])
def test_the_gradient_reaches_the_lora_alone(backbone: Backbone, colour_pool: ImagePool, adapter_share: float):
    attached = attach_lora(backbone.model, LoRAConfig(), generator=torch.Generator().manual_seed(0))
    shape = EpisodeShape(n_way=3, n_shot=1, n_query=4)
    episode = EpisodeSampler(classes_of(colour_pool), shape, seed=0, adapter_share=adapter_share, keep_ratio=0.5).draw(0)
    student = Student(backbone, "fp32")
    loss, accuracy = loss_of(student, episode, keep_ratio=0.5)
    loss.backward()
    assert not accuracy.requires_grad
    trained = {name for name, parameter in student.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in student.named_parameters() if name.endswith((".lora_a", ".lora_b"))}
    assert all(lora.lora_b.grad.abs().max() > 0 for lora in attached)


def test_the_student_sees_normalised_pixels_and_the_patches_kept(backbone: Backbone):
    pixels = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    student = Student(backbone, "fp32")
    torch.testing.assert_close(student(pixels, None), backbone.model((pixels - 0.5) / 0.5))
    keep = torch.tensor([[0, 5], [3, 2]])
    changed = pixels.clone()
    changed[0, :, 8:16, 16:24] = 0  # patch 6, which is not kept
    assert torch.equal(student(pixels, keep)[0], student(changed, keep)[0])
    changed[0, :, 8:16, 8:16] = 0  # patch 5, which is
    assert not torch.allclose(student(pixels, keep)[0], student(changed, keep)[0])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"episodes_per_step": 3, "num_workers": 4}, "episodes_per_step 3 leaves some of num_workers 4 idle"),
        ({"episodes_per_step": 4, "num_workers": 2, "min_workers": 3}, "min_workers 3 is more than num_workers 2"),
        ({"smallest_episode": {"n_way": 6, "n_query": 1}}, "smallest_episode.n_way 6 is more than episode.n_way 5"),
        *(
            ({"keep_ratio": 0.5, "augmentation": {view: 0.2}}, f"does not go with augmentation.{view}")
            for view in ("roll", "affine", "crop")
        ),
        ({"keep_ratio": 0.0}, "keep_ratio"),
        ({"adapter_share": 1.5}, "adapter_share"),
        ({"temperature": 0}, "temperature"),
        ({"distance": "manhattan"}, "distance"),
        ({"no_such_key": 1}, "no_such_key"),
        ({"objective": "joint", "relations": {"share": 0.5}}, "objective joint does not go with relations.share 0.5"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(wrong: dict[str, Any], message: str):
    with pytest.raises(ValidationError, match=message):
        TrainConfig(**wrong)


@pytest.mark.parametrize(
    "right",
    [
        {"episodes_per_step": 3, "num_workers": 2, "min_workers": 1},
        {"smallest_episode": {"n_way": 5, "n_query": 7}},
        {"keep_ratio": 0.5, "augmentation": {"blur": 0.5, "colour": 0.2}},
        {"keep_ratio": 1.0, "augmentation": {"crop": 0.2}},
    ],
)
def test_settings_that_go_together(right: dict[str, Any]):
    TrainConfig(**right)
