// Package dist holds the tests of what is in dist/kubernetes and dist/helm. It is a module of its own: helm and
// kustomize are linked into its tests, and nothing of them into overlayd.
package dist
