"""How samples are scored: what makes numbers of this field differ, each way under a name.

Numbers of different protocols are never compared. Sources: ADM's evaluator (Dhariwal and Nichol, guided-diffusion,
evaluations/evaluator.py), JiT's use of torch-fidelity (arXiv:2511.13720), and the sampler that DiffMoE
(arXiv:2503.14487) released, which DSMoE's numbers come from.
"""

from dataclasses import dataclass

from moe_dit.runtime.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """One way to score.

    Attributes:
        name: of --protocol.
        about: what it does, for people.
        published: whether its numbers are those of Inception with published weights; a fitted classifier has no place.
        half_pixel: images are resized as pytorch-fid does.
        rounded: images are 8-bit numbers; else floats as the VAE gives them, which image files cannot hold.
        spatial: sFID too.
        shuffle: the Inception Score's parts are of shuffled samples.
        kernel: KID too.
        neighbours: precision, recall, density and coverage too.
        all_samples: precision and recall are of all samples; else of 10,000.
    """

    name: str
    about: str
    published: bool = True
    half_pixel: bool = False
    rounded: bool = True
    spatial: bool = False
    shuffle: bool = True
    kernel: bool = False
    neighbours: bool = False
    all_samples: bool = False

    def check(self, inception: str | None) -> None:
        """Raise InputError where the protocol needs Inception, and there are no weights of it."""
        if self.published and inception is None:
            raise InputError(
                f"--protocol {self.name} compares Inception's features; give --inception FILE.pth or download"
            )


PROTOCOLS = {
    protocol.name: protocol
    for protocol in (
        Protocol(
            "fidelity",
            "torch-fidelity: 8-bit images, TensorFlow 1's resize; for references of one's own",
            published=False,
            kernel=True,
            neighbours=True,
        ),
        Protocol(
            "adm",
            "OpenAI's evaluator: 8-bit images, TensorFlow 1's resize, sFID, Inception Score unshuffled, precision and "
            "recall against the reference file's images",
            spatial=True,
            shuffle=False,
            neighbours=True,
            all_samples=True,
        ),
        Protocol("jit", "torch-fidelity as JiT uses it: FID to jit_in256_stats.npz, Inception Score shuffled"),
        Protocol(
            "diffmoe",
            "DiffMoE's and DSMoE's released sampler: images as floats, not rounded, pytorch-fid's resize, features "
            "against ADM's mu and sigma; Inception Score by these logits, since ADM's graph needs TensorFlow",
            half_pixel=True,
            rounded=False,
            shuffle=False,
        ),
    )
}
