"""The methods by name: "module:Class", imported when a run uses one."""

TUNED: dict[str, str] = {
    "dreambooth": "train.methods.tuned.dreambooth:DreamBooth",
    "dreambooth_lora": "train.methods.tuned.dreambooth:DreamBoothLora",
    "textual_inversion": "train.methods.tuned.textual_inversion:TextualInversion",
    "prompt_plus": "train.methods.tuned.prompt_plus:PromptPlus",
    "neti": "train.methods.tuned.neti:Neti",
    "custom_diffusion": "train.methods.tuned.custom_diffusion:CustomDiffusion",
    "perfusion": "train.methods.tuned.perfusion:Perfusion",
    "svdiff": "train.methods.tuned.svdiff:Svdiff",
}
ENCODERS: dict[str, str] = {
    "ip_adapter": "train.methods.encoders.ip_adapter:IPAdapter",
    "concatenated": "train.methods.encoders.concatenated:Concatenated",
    "photomaker": "train.methods.encoders.photomaker:PhotoMaker",
    "face0": "train.methods.encoders.face_embedding:Face0",
    "instantid": "train.methods.encoders.face_embedding:InstantID",
    "elite": "train.methods.encoders.elite:Elite",
}
METHODS: dict[str, str] = {**TUNED, **ENCODERS}
