# Completion of ulbq for fish; it asks ulbq itself. Copy this file into ~/.config/fish/completions/.

function __ulbq_complete
    set -l current (commandline -ct)
    # fish completes --option=value as one word
    set -l option (string match -r -- '^-[^=]*=' $current)
    set current (string replace -- "$option" '' $current)
    set -lx _ULBQ_COMPLETE complete_fish
    set -lx _ULBQ_MARKS 1
    set -lx _TYPER_COMPLETE_FISH_ACTION get-args
    set -lx _TYPER_COMPLETE_ARGS (commandline -cp)
    set -l program (commandline -opc)[1]
    for line in ($program 2>/dev/null)
        switch $line
            case :files
                complete -C "'' $current" | string replace -r '^' -- "$option"
            case :folders
                __fish_complete_directories "$current" | string replace -r '^' -- "$option"
            case :list
            case '*'
                echo "$option$line"
        end
    end
end

complete -c ulbq -f -a '(__ulbq_complete)'
