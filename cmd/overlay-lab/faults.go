package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"regexp"
	"time"

	"github.com/spf13/cobra"

	"github.com/overlayd/overlayd/test/faults"
)

func faultsCommand(f *flags) *cobra.Command {
	var only string
	o := faults.Options{Progress: func(line string) { fmt.Fprintln(os.Stderr, line) }}
	cmd := &cobra.Command{
		Use: "faults", Short: "Break everything that can break, one by one, and see that traffic survives", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			re, err := regexp.Compile(only)
			if err != nil {
				return usageError{fmt.Errorf("--only: %w", err)}
			}
			o.Only = re
			if o.Name, o.Overlayd, err = f.binaries(cmd); err != nil {
				return err
			}
			return f.faults(cmd.Context(), o)
		},
	}
	fs := cmd.Flags()
	fs.BoolVar(&o.Short, "short", false, "a representative part, in a few minutes")
	fs.StringVar(&only, "only", "", "rows that match this `pattern`, such as 'kernel: .*(vxlan)' or '(host-gw)'")
	fs.IntVar(&o.Parallel, "parallel", 2, "labs at a time")
	fs.StringVar(&f.lab.Overlayd, "overlayd", "", "path of overlayd (default: next to overlay-lab)")
	f.addOutput(cmd)
	return cmd
}

// binaries completes what the labs are made from.
func (f *flags) binaries(cmd *cobra.Command) (name, overlayd string, err error) {
	o := f.lab
	if !cmd.Flags().Changed("name") {
		o.Name = cmd.Name()
	}
	if o, err = o.Defaults(); err != nil {
		return "", "", err
	}
	if err := o.Validate(); err != nil {
		return "", "", usageError{err}
	}
	if _, err := os.Stat(o.Overlayd); err != nil {
		return "", "", usageError{fmt.Errorf("--overlayd: %w", err)}
	}
	return o.Name, o.Overlayd, nil
}

func (f *flags) faults(ctx context.Context, o faults.Options) error {
	report, err := faults.Run(ctx, o)
	if errors.Is(err, faults.ErrNoRow) {
		return usageError{fmt.Errorf("faults: %w", err)}
	}
	if err != nil {
		return err
	}
	if err := f.print(os.Stdout, report); err != nil {
		return err
	}
	if report.Failed > 0 {
		return errFailed
	}
	return nil
}

func soakCommand(f *flags) *cobra.Command {
	minutes := 10
	o := faults.SoakOptions{Progress: func(line string) { fmt.Fprintln(os.Stderr, line) }}
	cmd := &cobra.Command{
		Use:   "soak",
		Short: "Make random faults for a while, and see that everything ends up as planned and nothing grows", Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			var err error
			if o.Name, o.Overlayd, err = f.binaries(cmd); err != nil {
				return err
			}
			o.For = time.Duration(minutes) * time.Minute
			if !cmd.Flags().Changed("seed") {
				o.Seed = rand.Uint64N(1_000_000)
			}
			o.Progress(fmt.Sprintf("the seed is %d: --seed %d does the same again", o.Seed, o.Seed))
			return f.soak(cmd.Context(), o)
		},
	}
	fs := cmd.Flags()
	fs.IntVar(&minutes, "minutes", 10, "how long")
	fs.Uint64Var(&o.Seed, "seed", 0, "what happens follows from it (default: a random one, which is printed)")
	fs.StringVar(&f.lab.Overlayd, "overlayd", "", "path of overlayd (default: next to overlay-lab)")
	f.addOutput(cmd)
	return cmd
}

func (f *flags) soak(ctx context.Context, o faults.SoakOptions) error {
	report, err := faults.Soak(ctx, o)
	if err != nil {
		return err
	}
	if err := f.print(os.Stdout, report); err != nil {
		return err
	}
	if len(report.Problems) > 0 {
		return errFailed
	}
	return nil
}
