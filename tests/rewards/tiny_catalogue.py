"""The catalogue's rewards on tiny networks of random weights: what their loaders build from published files."""

from pathlib import Path
from tempfile import TemporaryDirectory

import layouts
import torch
from tiny_detector import tiny_dino, tiny_owl
from tiny_siglip import tiny_siglip
from tiny_vlm import tiny_llava
from tiny_words import bert_words, clip_words

from tropism.rewards import aesthetic, feature_distance, features, hps, imagereward, objects, pixels, towers, vqa
from tropism.rewards.clip import Clip, ClipScore


def spelled(make):
    with TemporaryDirectory() as folder:
        return make(Path(folder))


def siglip():
    return ClipScore(Clip(*tiny_siglip()), "siglip")


def laion(clip):
    torch.manual_seed(0)
    layers = [torch.nn.Linear(a, b) for a, b in ((clip.width, 24), (24, 1))]
    head = aesthetic.LinearHead([(layer.weight.detach(), layer.bias.detach()) for layer in layers])
    return aesthetic.Aesthetic(clip, head)


def human_preference():
    words = spelled(clip_words)
    model = hps.open_clip_model(layouts.open_clip_state(len(words)), "here")
    return ClipScore(Clip(model, words, hps.Letterbox(layouts.SIDE)), "hps")


def image_reward():
    words = spelled(bert_words)
    return imagereward.ImageReward(imagereward.judge_of(layouts.image_reward_state(len(words)), "here"), words)


def detections(kind):
    """Boxes that stand still and overlap: how boxes move is left out of the gradient on purpose, and not of differences."""
    words = spelled(clip_words)
    model = tiny_owl(words)
    with torch.no_grad():
        model.box_head.dense2.weight.zero_()
        model.box_head.dense2.bias.copy_(torch.tensor([0.0, 0.0, 1.8, 1.8]))
    return kind(objects.Detector(model, words), kind.__name__)


def likeness():
    usual = features.USUAL
    return features.FeatureSimilarity(tiny_dino(), pixels.Preparation((64,), (56, 56), mean=usual.mean, std=usual.std))


def asked():
    model, words = tiny_llava()
    family = vqa.Llava(pixels.Preparation((48,), (48, 48)), model.config.image_token_id)
    return vqa.Vqa(vqa.full_precision(model), words, family, vqa.CHAT["llava"])


def distance(**choice):
    return feature_distance.FeatureDistance(towers.Tower(tiny_dino(), size=56), **choice)
