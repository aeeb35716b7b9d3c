"""Source packages from the index that pip is set up with, as files: nothing of them is built, imported or run, which `pip download` would do."""

import hashlib
import sys

from pip._internal.commands import create_command


def fetch(name, version):
    """The bytes of a package's source archive."""
    download = create_command('download')
    options, _ = download.parse_args(['--no-binary', ':all:', '--no-deps', name])
    with download.main_context():
        session = download.get_default_session(options)
        finder = download._build_package_finder(options, session)
        links = [c.link for c in finder.find_all_candidates(name) if str(c.version) == version]
        if not links:
            sys.exit(f'the index has no source of {name}=={version}')
        answer = session.get(links[0].url_without_fragment, headers={'Accept-Encoding': 'identity'})
        answer.raise_for_status()
    expected = links[0].hash
    if expected and hashlib.new(links[0].hash_name, answer.content).hexdigest() != expected:
        sys.exit(f'the source of {name} is not what the index says')
    return answer.content
