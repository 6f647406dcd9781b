"""Files that are refused by the name of what they hold, and why. For messages only."""

# `general.type` -> what such a file holds.
TYPES = {
    "mmproj": "the vision or audio part of a model",
    "adapter": "a LoRA adapter: merge it with its model (llama-export-lora)",
    "imatrix": "statistics for quantization",
}

# What it is -> `general.architecture`, of files for llama.cpp, stable-diffusion.cpp and ComfyUI.
_ARCHITECTURES = {
    "an image or video generator": (
        "flux sd1 sdxl sd3 aura hidream cosmos ltxv hyvid wan lumina2 qwen_image pig chroma z_image"
    ),
    "the vision or audio part of a model": "clip",
    "a control vector": "controlvector",
    "a text encoder": (
        "bert modern-bert nomic-bert nomic-bert-moe neo-bert jina-bert-v2 jina-bert-v3 eurobert gemma-embedding "
        "llama-embed t5encoder"
    ),
    "an encoder and a decoder": "t5",
    "a model of sound": "wavtokenizer-dec pockettts qwen3tts whisper",
    "a language model that denoises its whole text": "llada llada-moe dream rnd1",
    "a draft model, which reads another model's states": "eagle3 dflash gemma4-assistant",
}
ARCHITECTURES = {name: kind for kind, names in _ARCHITECTURES.items() for name in names.split()}

# `general.architecture` of language models that are left out on purpose -> why.
LEFT_OUT = {
    "chameleon": "llama.cpp gives its image tokens no logits, and MLPs of its larger size read the wrong states there",
    "gptj": "llama.cpp has its name but no graph for it",
    "graniteswitch": "its tokens switch LoRA adapters on and off for those after them",
    "qwen4exp": "llama.cpp's own sources call its graph provisional",
}
