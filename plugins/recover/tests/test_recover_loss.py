"""The loss against a teacher is the textbook's, with its gradient, in the memory of a chunk."""

import pytest
import torch
from modulora_recover.loss import TeacherLoss
from torch.nn.functional import cross_entropy, kl_div

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS, VOCABULARY = 20, 96


def random(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def textbook(z, goals, teacher):
    """(1 - x) CE + x KL over k + 1 classes, ``[n, 1]``, by torch's own functions."""
    p = z.softmax(1)
    chosen = torch.zeros_like(p, dtype=torch.bool).scatter(1, teacher.tokens, True)
    others = p.masked_fill(chosen, 0).sum(1, keepdim=True)
    classes = torch.cat([p.gather(1, teacher.tokens), others], 1).clamp_min(1e-300)
    rest = 1 - teacher.probabilities.sum(1, keepdim=True)
    t = torch.cat([teacher.probabilities, rest], 1)
    divergence = kl_div(classes.log(), t, reduction="none").sum(1)
    data = cross_entropy(z, goals, reduction="none")
    return ((1 - teacher.weight) * data + teacher.weight * divergence)[:, None]


@pytest.mark.parametrize("weight", [0.3, 1.0])
@pytest.mark.parametrize("k", [1, 7, VOCABULARY - 1])
def test_each_row_has_the_textbooks_loss_and_gradient(k, weight):
    probabilities, tokens = random(ROWS, VOCABULARY, seed=3).softmax(1).topk(k)
    teacher = TeacherLoss(tokens, probabilities, weight)
    z = random(ROWS, VOCABULARY, seed=4).requires_grad_()
    goals = torch.arange(ROWS) % VOCABULARY
    expected = textbook(z, goals, teacher)
    expected.sum().backward()
    for rows in (slice(0, 7), slice(7, ROWS)):
        found = z.detach()[rows].clone()
        loss = teacher(found, goals[rows, None], rows, True)
        torch.testing.assert_close(loss, expected.detach()[rows], rtol=1e-9, atol=1e-11)
        assert z.grad is not None
        torch.testing.assert_close(found, z.grad[rows], rtol=1e-9, atol=1e-11)
        without = teacher(z.detach()[rows].clone(), goals[rows, None], rows, False)
        torch.testing.assert_close(without, loss, rtol=0, atol=0)


@pytest.mark.parametrize("share", [1.0, 0.5])
def test_a_teacher_who_is_sure_gives_finite_gradients(share):
    """In fp32 the model's other tokens, and the teacher's, have probability 0."""
    goals = torch.arange(ROWS)[:, None]
    for tokens in (torch.zeros(ROWS, 1, dtype=torch.int64), goals):
        z = 1e4 * random(ROWS, VOCABULARY, seed=4).float()
        teacher = TeacherLoss(tokens, torch.full((ROWS, 1), share), 0.5)
        assert teacher(z, goals, slice(0, ROWS), True).isfinite().all()
        assert z.isfinite().all()
