import jax
import jax.numpy as jnp
import pytest

from guided_distill.errors import UserError
from guided_distill.optim import OptimiserConfig
from guided_distill.state import check_same_model, make_state, student_params

TEACHER = {"embedding": {"time1": {"kernel": jnp.ones((2, 3))}}, "out": jnp.full(4, 2.0)}
FRESH = {
    "embedding": {"time1": {"kernel": jnp.zeros((2, 3))}, "w1": {"kernel": jnp.full((1, 3), 7.0)}},
    "out": jnp.zeros(4),
}


def test_student_takes_all_of_its_teacher_and_fresh_weights_for_w_only():
    student = student_params(TEACHER, FRESH)
    assert (student["embedding"]["time1"]["kernel"] == 1).all() and (student["out"] == 2).all()
    assert (student["embedding"]["w1"]["kernel"] == 7).all()


def test_student_shares_no_buffer_with_its_teacher():
    student = student_params(TEACHER, FRESH)
    student["out"].delete()
    assert (TEACHER["out"] == 2).all()


@pytest.mark.parametrize(
    ("params", "says"),
    [
        ({**TEACHER, "more": jnp.ones(1)}, "runs/x has unknown more"),
        ({"embedding": TEACHER["embedding"]}, "runs/x lacks out"),
        ({**TEACHER, "out": jnp.ones(5)}, "runs/x has another shape of out"),
        (FRESH, "runs/x has unknown embedding/w1/kernel"),
    ],
)
def test_a_checkpoint_of_another_model_is_named(params, says):
    check_same_model(TEACHER, TEACHER, "runs/x")
    with pytest.raises(UserError, match=says):
        check_same_model(params, TEACHER, "runs/x")


def test_state_has_a_buffer_of_its_own_for_every_leaf():
    state = make_state(TEACHER, OptimiserConfig(ema=0.9))
    pointers = [leaf.unsafe_buffer_pointer() for leaf in jax.tree.leaves(state)]
    assert len(set(pointers)) == len(pointers)
