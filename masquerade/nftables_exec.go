package masquerade

import (
	"context"
	"errors"
	"fmt"
	"os/exec"
	"strings"

	"sigs.k8s.io/knftables"

	"github.com/overlayd/overlayd/addr"
)

// nftTool is the program nft, for our own tables.
type nftTool struct {
	run  runner
	open func() (knftables.Interface, error)
}

func newNFTTool() nftTool {
	return nftTool{run: execRun, open: func() (knftables.Interface, error) {
		return knftables.New("", "", knftables.NoObjectCommentEmulation)
	}}
}

// list reads our table; one that is not there is an empty value.
func (n nftTool) list(ctx context.Context, f addr.Family) (nftTable, error) {
	none := nftTable{family: f}
	out, err := n.run(ctx, "", nftProgram, "-j", "list", "table", string(nftFamily(f)), nftTableName)
	if nftNothingThere(err) {
		return none, nil
	}
	if err != nil {
		return none, err
	}
	return parseNFTTable(f, out), nil
}

// forwardPolicy is the policy of the FORWARD chain of iptables-nft; empty when there is no such chain.
func (n nftTool) forwardPolicy(ctx context.Context, f addr.Family) (string, error) {
	out, err := n.run(ctx, "", nftProgram, "-j", "list", "chains", string(nftFamily(f)))
	if err != nil {
		return "", err
	}
	return parseForwardPolicy(f, out)
}

// apply turns what is there into what is wanted, in one transaction.
func (n nftTool) apply(ctx context.Context, rs Ruleset, have, want nftTable) error {
	tx, err := n.open()
	if err != nil {
		return err
	}
	t := tx.NewTransaction()
	switch {
	case have.sameBut(want):
		changeMembers(t, rs, have)
	default:
		replaceTable(t, rs, have.exists)
	}
	return n.commit(ctx, tx, t)
}

// remove removes our table, if there is one. Where there is no nft, or no nf_tables, there is none.
func (n nftTool) remove(ctx context.Context, f addr.Family) error {
	have, err := n.list(ctx, f)
	if errors.Is(err, exec.ErrNotFound) {
		return nil
	}
	if err != nil || !have.exists {
		return err
	}
	tx, err := n.open()
	if err != nil {
		return err
	}
	t := tx.NewTransaction()
	replaceTable(t, Ruleset{Family: f}, true)
	return n.commit(ctx, tx, t)
}

// commit runs the transaction; of nft's error the first line says what happened.
func (nftTool) commit(ctx context.Context, tx knftables.Interface, t *knftables.Transaction) error {
	err := tx.Run(ctx, t)
	switch {
	case err == nil:
		return nil
	case ctx.Err() != nil:
		return fmt.Errorf("nft: %w", context.Cause(ctx))
	}
	line, _, _ := strings.Cut(strings.TrimSpace(err.Error()), "\n")
	return fmt.Errorf("nft: %s: %w", line, errNFT)
}

// errNFT stands for knftables' error, whose text is several lines long.
var errNFT = errors.New("the transaction was refused")

// nftNothingThere tells whether a listing failed because there is no such table, or no kernel support for any.
func nftNothingThere(err error) bool {
	e := (*commandError)(nil)
	return errors.As(err, &e) && (strings.Contains(e.stderr, "No such file or directory") || strings.Contains(e.stderr, "not supported") ||
		strings.Contains(e.stderr, "JSON support not compiled-in")) // such an nft never made a table of ours
}
