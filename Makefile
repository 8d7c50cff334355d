# xman: the two commands of the README are `make demo` and `make test`.

PREFIX ?= /usr/local
DESTDIR ?=
CARGO ?= cargo
# What install takes: release, or debug to try an installation.
PROFILE ?= release
TARGET := $(or $(CARGO_TARGET_DIR),target)

BIN := $(DESTDIR)$(PREFIX)/bin
SBIN := $(DESTDIR)$(PREFIX)/sbin
MAN := $(DESTDIR)$(PREFIX)/share/man
SHARE := $(DESTDIR)$(PREFIX)/share
UNIT := $(DESTDIR)$(if $(filter /usr,$(PREFIX)),/usr,$(PREFIX))/lib/systemd/system
ETC := $(DESTDIR)/etc/xman

.PHONY: help setup build release check format clippy laws deny audit test bench demo install clean

help: ## Shows the targets.
	@grep -hE '^[a-z-]+:.*## ' Makefile | sed 's/:.*## /\t/' | expand -t 12

setup: ## Installs what building and testing need (Debian, Ubuntu).
	@deploy/setup.sh

build: setup ## Builds everything for testing.
	$(CARGO) build --workspace --all-targets --locked

release: setup ## Builds the programs for use.
	$(CARGO) build --release --locked -p xman-server -p xman-client

check: setup format clippy laws deny ## Format, lints, the laws, licences and bans.

format:
	$(CARGO) fmt --all -- --check

clippy:
	$(CARGO) clippy --workspace --all-targets --locked -- -D warnings

laws: ## Greps that hold what DESIGN and ARCHITECTURE promise.
	tests/laws.sh

deny:
	$(CARGO) deny --offline check bans licenses sources

audit: ## Known advisories; needs the advisory database.
	$(CARGO) deny check advisories

# Properties are tried with the same cases each time here; `cargo test` alone looks for new ones.
test: check build ## Everything, against real services.
	PROPTEST_RNG_SEED=9626 $(CARGO) test --workspace --locked

bench: release ## What a decision costs, how long a job waits for its room, and a guest's way to another host.
	$(CARGO) bench --locked -p xman-policy
	$(CARGO) bench --locked -p xman-tests --bench schedule
	$(CARGO) bench --locked -p xman-tests --bench migration

demo: release ## A throwaway realm, a real guest, a refused stranger, the audit.
	$(CARGO) build --release --locked -p xman-tests --bin xman-demo
	$(TARGET)/release/xman-demo

install: ## Installs what `make release` built (PREFIX, DESTDIR).
	@test -x $(TARGET)/$(PROFILE)/xmand -a -x $(TARGET)/$(PROFILE)/rxm || { echo "run 'make release' first" >&2; exit 1; }
	install -D -m 0755 $(TARGET)/$(PROFILE)/xmand $(SBIN)/xmand
	install -D -m 0755 $(TARGET)/$(PROFILE)/rxm $(BIN)/rxm
	install -D -m 0755 $(TARGET)/$(PROFILE)/xman-hook $(SBIN)/xman-hook
	install -d $(MAN)/man1 $(MAN)/man5 $(MAN)/man8
	$(TARGET)/$(PROFILE)/rxm man $(MAN)/man1
	$(TARGET)/$(PROFILE)/xman-hook man $(MAN)/man8
	install -m 0644 docs/man/xmand.8 $(MAN)/man8/
	install -m 0644 docs/man/xmand.toml.5 $(MAN)/man5/
	install -d $(SHARE)/bash-completion/completions $(SHARE)/zsh/site-functions $(SHARE)/fish/vendor_completions.d
	$(TARGET)/$(PROFILE)/rxm completion bash > $(SHARE)/bash-completion/completions/rxm
	$(TARGET)/$(PROFILE)/rxm completion zsh > $(SHARE)/zsh/site-functions/_rxm
	$(TARGET)/$(PROFILE)/rxm completion fish > $(SHARE)/fish/vendor_completions.d/rxm.fish
	install -d $(UNIT)
	sed 's,@SBINDIR@,$(PREFIX)/sbin,' deploy/xmand.service > $(UNIT)/xmand.service
	chmod 0644 $(UNIT)/xmand.service
	install -D -m 0644 deploy/xmand.toml $(ETC)/xmand.toml.example
	install -D -m 0644 deploy/rxm.toml $(ETC)/rxm.toml.example
	install -D -m 0644 deploy/hook.toml $(ETC)/hook.toml.example
	for system in slurm gridengine pbs torque htcondor; do install -d $(SHARE)/doc/xman/$$system && cp -R deploy/$$system/. $(SHARE)/doc/xman/$$system; done
	install -d $(SHARE)/doc/xman/batch
	install -m 0644 docs/BATCH.md docs/SCHEDULING.md $(SHARE)/doc/xman/
	install -m 0644 docs/batch/*.md $(SHARE)/doc/xman/batch/
	install -D -m 0644 deploy/rsyslog-xman.conf $(SHARE)/doc/xman/rsyslog-xman.conf
	install -D -m 0644 policy/schema.cedarschema $(SHARE)/xman/schema.cedarschema
	install -d $(SHARE)/doc/xman/policy
	cp -R deploy/policy/. $(SHARE)/doc/xman/policy
	install -D -m 0755 deploy/xman-authority.py $(SHARE)/doc/xman/xman-authority.py

clean: ## Removes what was built.
	$(CARGO) clean
