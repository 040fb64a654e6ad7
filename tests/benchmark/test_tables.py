from ijepa_scale.benchmark.tables import show_steps


def test_what_is_shown_of_a_gpu(capsys):
    spread = {"median": 2000.0, "low": 1500.0, "high": 2500.0}
    numbers = dict.fromkeys(("images_per_second", "tokens_per_second", "gflop_per_second", "speedup"), spread)
    row = {
        "name": "ours",
        "context_tokens_per_image": 70.0,
        "gflop_per_step": 84_000,
        "share_of_matmul": 0.5,
        **numbers,
    }
    row |= {"state_bytes": 3 << 30, "step_bytes": 5 << 29}
    machine = {"gpu": "A GPU", "cuda": "13", "torch": "2.11"}
    found = {"machine": machine, "batch": 64, "batch_asked": 128, "precision": "bf16", "zero_stage": 1, "rounds": 6}
    found |= {"operations": "Triton kernels", "attention": "fa3", "activation_checkpointing": "none"}
    found |= {"matmuls": {"matmul 1 x 2 x 3": spread}, "allocator_retries": 7}
    show_steps({"config": "vith14", **found, "steps": [{**row, "mfu": 0.412}, row]})
    said = capsys.readouterr().out
    for words in (
        "A GPU",
        "attention: fa3",
        "84.00",
        "2.0 (1.5-2.5)",
        "41.2%",
        "peak unknown",
        "3.0 + 2.5",
        "1 x 2 x 3: 2 (2-2)",
    ):
        assert words in said
    assert "128 images did not fit" in said and "7 times" in " ".join(said.split()) and "CPU" not in said
    show_steps({"config": "vith14", **found, "steps": [row], "batch_asked": 64, "allocator_retries": 0})
    said = capsys.readouterr().out
    assert "did not fit" not in said and "nearly full" not in said
