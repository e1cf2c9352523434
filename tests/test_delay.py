"""Fine-tuning keeps what imitation learned about time: a policy that plans while its last chunk still runs."""

import dataclasses

import pytest

from flow_policy_rl import collect, evaluate, presets, train, train_config


@pytest.mark.slow
def test_success_under_inference_delay_survives_fine_tuning(tmp_path):
    """Prefixes of up to 3 actions; a delay of 2 control steps is 100 ms. The demo's base leaves room for RL."""
    demos = tmp_path / "demos.hdf5"
    collect.main(collect.Config("lift", demos, episodes=50, noise=0.03))
    base, tuned = tmp_path / "base", tmp_path / "tuned"
    imitation = train_config.default_config("bc", "lift")
    train.main(
        dataclasses.replace(
            imitation,
            demos=demos,
            run_dir=base,
            prefix_horizon=3,
            bc=presets.demo_bc("lift", cameras=False),
        )
    )
    config = train_config.default_config("score_flow", "lift")
    train.main(
        dataclasses.replace(
            config,
            checkpoint=base / train.POLICY_FILE,
            run_dir=tuned,
            eval_every=0,
            ppo=dataclasses.replace(config.ppo, num_iterations=8),
        )
    )

    def success(run_dir, delay: int) -> float:
        policy = run_dir / train.POLICY_FILE
        return evaluate.main(evaluate.Config(policy, "lift", episodes=100, inference_delay=delay))[
            "success_rate"
        ]

    before, at_once, late = success(base, 0), success(tuned, 0), success(tuned, 2)
    assert at_once > before + 0.15
    assert late > at_once - 0.1
