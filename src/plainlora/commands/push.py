"""`plainlora push`: publishes an adapter's or a model's folder on the Hub."""

import argparse


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the flags."""
    folder = parser.add_mutually_exclusive_group(required=True)
    folder.add_argument("--adapter", help="folder that training wrote")
    folder.add_argument("--model", dest="adapter", metavar="MODEL", help="folder of a whole or merged model")
    parser.add_argument("--repo", required=True, help="USER/NAME on the Hub; created if it is missing")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--base_model", help="Hub id of the base, if the folder names none or a local folder")
    parser.add_argument("--base_revision", help="branch, tag or commit of an adapter's base")
    parser.add_argument("--revision", help="branch to push to, created if it is missing; the main one if left out")
    parser.add_argument("--commit_message", default="Upload with PlainLoRA", help="message of the one commit")


def run(arguments: argparse.Namespace) -> None:
    """Checks the folder, logs in, pushes, and prints the address."""
    import plainlora.quiet  # noqa: F401
    from plainlora.hub.publication import collect_publication
    from plainlora.hub.pushing import push
    from plainlora.hub.repository import open_repository

    publication = collect_publication(arguments.adapter, arguments.base_model, arguments.base_revision)
    repository = open_repository(arguments.repo, private=arguments.private, revision=arguments.revision)
    print(push(publication, repository, arguments.commit_message))
