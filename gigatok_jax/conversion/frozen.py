"""Weights of the frozen networks: their names, and the files people have."""

# Index of each convolution in torchvision's VGG16, by stage.
_VGG16 = ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))


def lpips_rules() -> list[tuple[str, str, str]]:
    """Name table of LPIPS with VGG16; rows as in `conversion.discriminator`."""
    rules = [(f"params/head_{i}", f"lin{i}.model.1.weight", "head") for i in range(5)]
    for i, indices in enumerate(_VGG16, start=1):
        for j, index in enumerate(indices, start=1):
            ours, theirs = f"params/vgg/conv{i}_{j}", f"net.slice{i}.{index}"
            rules.append((f"{ours}/kernel", f"{theirs}.weight", "conv"))
            rules.append((f"{ours}/bias", f"{theirs}.bias", "plain"))
    return rules
