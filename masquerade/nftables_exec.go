package masquerade

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"

	"github.com/overlayd/overlayd/addr"
)

// host is what a driver looks at and works with.
type host struct {
	run    runner
	kernel Kernel
}

// newHost is the host itself; a nil kernel cannot be asked.
func newHost(k Kernel) host {
	if k == nil {
		k = noKernel{}
	}
	return host{execRun, k}
}

// nftWorks tries whether nft can be used; it changes nothing.
func (h host) nftWorks(ctx context.Context) bool {
	_, err := h.run(ctx, "table ip "+nftTableName+" {}\n", nftProgram, "--check", "-f", "-")
	return err == nil
}

// readNFT reads our table in nftables; one that is not there is an empty value.
func (h host) readNFT(f addr.Family) (nftTable, error) {
	t := nftTable{family: f}
	objects, plain, err := h.kernel.Table(f, nftTableName)
	if errors.Is(err, os.ErrNotExist) {
		return t, nil
	}
	if err != nil {
		return t, fmt.Errorf("read table %s: %w", nftTableName, err)
	}
	t.exists, t.objects, t.plain = true, objects, plain
	t.chain, err = h.kernel.Chain(f, nftTableName, nftChainName)
	if err == nil {
		var rules [][]string
		rules, err = h.kernel.Rules(f, nftTableName, nftChainName)
		t.rules = ruleLines(rules)
	}
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return t, fmt.Errorf("read table %s: %w", nftTableName, err)
	}
	for _, name := range setNames(f) {
		s := nftSet{name: name}
		switch s.kind, s.members, err = h.kernel.Set(f, nftTableName, name); {
		case err == nil:
			t.sets = append(t.sets, s)
		case !errors.Is(err, os.ErrNotExist):
			return t, fmt.Errorf("read table %s: %w", nftTableName, err)
		}
	}
	return t, nil
}

// forwardPolicy is the policy of the FORWARD chain of iptables-nft; empty when there is no such chain.
func (h host) forwardPolicy(f addr.Family) (string, error) {
	base, err := h.kernel.Chain(f, string(Filter), string(Forward))
	if errors.Is(err, os.ErrNotExist) {
		return "", nil
	}
	_, policy, _ := strings.Cut(base, " policy ")
	return policy, err
}

// changeNFT turns what is there into what is wanted, in one transaction.
func (h host) changeNFT(ctx context.Context, rs Ruleset, have, want nftTable) error {
	if have.sameBut(want) {
		// Versions of nft differ in what they take in one transaction of networks that overlap.
		if _, err := h.run(ctx, changeMembers(rs, have), nftProgram, "-f", "-"); err == nil {
			return nil
		}
	}
	_, err := h.run(ctx, replaceTable(rs, have.exists), nftProgram, "-f", "-")
	return err
}

// removeNFT removes our table, if there is one. Where there is no nft, or no nf_tables, there is none.
func (h host) removeNFT(ctx context.Context, f addr.Family) error {
	if _, _, err := h.kernel.Table(f, nftTableName); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	_, err := h.run(ctx, "", nftProgram, "delete", "table", nftFamily(f), nftTableName)
	if errors.Is(err, exec.ErrNotFound) || nftNothingThere(err) {
		return nil
	}
	return err
}

// nftNothingThere tells whether nft failed because there is no such table, or no kernel support for any.
func nftNothingThere(err error) bool {
	e := (*commandError)(nil)
	return errors.As(err, &e) && (strings.Contains(e.stderr, "No such file or directory") || strings.Contains(e.stderr, "not supported"))
}
