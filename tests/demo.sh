#!/usr/bin/env bash
# Sign, encrypt and send a message for real, to a small mail server on this machine; then open it with openssl.
# Needs Python 3.10 or later, with venv, and openssl; leaves nothing behind but .venv.
set -euo pipefail
cd "$(dirname "$0")/.."
repository=$PWD

show() { printf '\n$ %s\n' "$*"; "$@"; }

[ -x .venv/bin/python ] || show python3 -m venv .venv
show .venv/bin/pip install --quiet --disable-pip-version-check -r requirements.txt aiosmtpd

umask 077
folder=$(mktemp -d)
server=
cleanup() { [ -z "$server" ] || kill "$server" 2>/dev/null || true; rm -rf "$folder"; }
trap cleanup EXIT
export PATH="$repository/.venv/bin:$PATH"
cd "$folder"
ln -s "$repository/sparkpostSMIME.py" "$repository/tests" .

printf '\n# Throwaway keys: a private key for Steve, who signs; a certificate for SteveT, who can decrypt\n'
for address in steve@thetucks.com steve.tuck@sparkpost.com; do
    show openssl req -x509 -newkey rsa:2048 -noenc -days 365 -subj "/CN=$address" -addext "subjectAltName=email:$address" \
        -keyout "$address.pem" -out "$address.crt" 2>/dev/null
done

printf '\n# A mail server that keeps what it gets\n'
port=$(python -c 'import socket; print(socket.create_server(("127.0.0.1", 0)).getsockname()[1])')
printf '\n$ python -m aiosmtpd --nosetuid --listen 127.0.0.1:%s --class aiosmtpd.handlers.Mailbox mail &\n' "$port"
python -m aiosmtpd --nosetuid --listen "127.0.0.1:$port" --class aiosmtpd.handlers.Mailbox mail >server.log 2>&1 &
server=$!
until python -c "import socket; socket.create_connection(('127.0.0.1', $port))" 2>/dev/null; do
    kill -0 "$server" 2>/dev/null || { cat server.log; exit 1; }
    sleep 0.05
done

printf '\n# The command of every day\n'
printf '\n$ export SMTP_HOST=localhost SMTP_PORT=%s\n' "$port"
export SMTP_HOST=localhost SMTP_PORT=$port
show ./sparkpostSMIME.py tests/fancy-HTML-to-smt.eml --sign --encrypt --send_smtp

printf '\n# What arrived: only SteveT can decrypt it, and it was signed by Steve\n'
mv mail/new/* arrived.eml
show head -n 12 arrived.eml
show openssl cms -decrypt -in arrived.eml -recip steve.tuck@sparkpost.com.crt -inkey steve.tuck@sparkpost.com.pem -out signed.eml
show openssl cms -verify -in signed.eml -CAfile steve@thetucks.com.crt -out message.eml
show head -n 9 message.eml
printf '\nThe message arrived, decrypted and verified.\n'
