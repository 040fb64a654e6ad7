import pytest

from ijepa_scale.config.redaction import HIDDEN, redacted

SECRET = "s3cr3tvalue"


@pytest.mark.parametrize(
    "value",
    [
        {"api_key": SECRET, "hf_token": SECRET, "nested": [{"password": SECRET}], "wandb": {"wandb_key": SECRET}},
        f"https://user:{SECRET}@host/x-{{000..009}}.tar",
        f"https://{SECRET}@host/x.tar",
        f"https://user:an@{SECRET}@host/x.tar",
        f"https://host/x.tar?X-Amz-Signature={SECRET}&part=1",
        f"HF_TOKEN={SECRET} python launch/pretrain.py",
        ["launch/pretrain.py", f"engine.deepspeed={{wandb: {{api_key: {SECRET}, team: x}}}}"],
        f"pipe:curl -H 'Authorization: Bearer {SECRET}' https://host",
        {"logging": {"wandb_project": (SECRET * 4)[:40]}},
        f"logging.wandb_project={(SECRET * 4)[:40]}",
        f"hf_{SECRET * 3}",
        {f"https://host?key={SECRET}": 1},
    ],
    ids=str,
)
def test_no_secret_is_left(value):
    shown = str(redacted(value))
    assert SECRET not in shown and HIDDEN in shown


@pytest.mark.parametrize(
    "value",
    [
        {"context_tokens": 2646, "logging": {"wandb": "online", "wandb_project": "ijepa-scale"}, "lr": 1e-3},
        ["launch/pretrain.py", "--config", "tiny", "data.source=/data/tokens and keys", "optimization.max_steps=2"],
        "https://host/shard-{000..009}.tar",
        "0123456789abcdef0123456789abcdef01234567",
        None,
    ],
    ids=str,
)
def test_what_is_no_secret_stays(value):
    assert redacted(value) == value
