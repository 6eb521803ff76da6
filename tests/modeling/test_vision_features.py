"""Which hidden state of the tower the projector reads, against the plain computation, layer by layer."""

import pytest
import torch


def plain_hidden_states(tower, pixels: torch.Tensor) -> list[torch.Tensor]:
    """The embeddings and the output of every layer, `float[N, P, C]` each."""
    hidden = tower.embeddings(pixels)
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    states = [hidden]
    for layer in tower.encoder.layers:
        output = layer(states[-1], attention_mask=None)
        states.append(output[0] if isinstance(output, tuple) else output)
    return states


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("layer", [-1, -2, 1, [-2, -1]])
@pytest.mark.parametrize("strategy", ["default", "full"])
def test_the_projector_reads_the_chosen_layer(tiny, vision, layer, strategy):
    model = tiny.model(vision=vision, vision_feature_layer=layer, projector_type="linear")
    model.config.vision_feature_select_strategy = strategy
    pixels = tiny.batch()["pixel_values"]
    with torch.no_grad():
        states = plain_hidden_states(model.model.vision_tower, pixels)
        chosen = [states[index] for index in (layer if isinstance(layer, list) else [layer])]
        features = torch.cat([state[:, 1:] if strategy == "default" else state for state in chosen], dim=-1)
        expected = model.model.multi_modal_projector(features)
        outputs = model.get_image_features(
            pixel_values=pixels,
            vision_feature_layer=layer,
            vision_feature_select_strategy=strategy,
            return_dict=True,
        )
        found = torch.stack(tuple(outputs.pooler_output))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert (states[-1] - states[-2]).abs().max() > 1e-2  # another layer would be seen
